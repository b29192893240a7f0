"""The interface of every value."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.diffusion.preview import Preview
from svdd.rewards.base import Reward
from svdd.state.state import State

__all__ = ["PreviewValue", "Value"]


class Value(nn.Module, ABC):
    """Estimates the soft value v_i(x_i) = alpha log E[exp(r(x_0) / alpha) given x_i] of every row.

    A subclass implements `estimate`. Call `bind` once before the first evaluation; `GuidedDiffusion` does.

    Attributes:
        most_rows: Maximum denoiser rows per evaluation of one row.
        preview: How the prediction of x0 that the value scores is cheaper than the model's own; None if it is not.
        differentiable: Whether gradients flow from the estimate to the latents.
        keep: How many rows of an image an estimate scores at most; the others get -inf. None: all rows.
    """

    most_rows: int = 1
    preview: Preview | None = None
    differentiable: bool = False
    keep: int | None = None
    _bound: tuple[Reward, ...] = ()  # a tuple, so that the reward is not registered a second time

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the guide reward. Subclasses extend it to build or load what depends on the diffusion model."""
        self._bound = (reward,)

    @property
    def reward(self) -> Reward:
        """The bound reward; UserError if none was bound."""
        if not self._bound:
            raise UserError(f"{type(self).__name__} has no reward yet: call value.bind(reward, diffusion) first")
        return self._bound[0]

    def describe(self) -> str:
        """Names what decides whether there is a gradient, for an error message."""
        return f"value {type(self).__name__}"

    @abstractmethod
    def estimate(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; only called before the end of the chain, i < T."""

    def forward(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; at the end of the chain the reward itself."""
        return state.scores(self.reward) if state.done else self.estimate(state)


class PreviewValue(Value):
    """A value that scores a decoded prediction of x_0, a preview; `PosteriorMean` explains the arguments."""

    def __init__(self, decoder: str | None = None, preview: Preview | None = None) -> None:
        super().__init__()
        self.decoder, self.preview = decoder, preview if preview is not None and preview.changes else None

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the reward, checks the kind of preview and loads the smaller decoder."""
        super().bind(reward, diffusion)
        if self.preview is not None:
            diffusion.check_preview(self.preview)
        self.differentiable = reward.differentiable and self.preview is None
        self.preview_decoder = None if self.decoder is None else diffusion.load_decoder(self.decoder)

    def describe(self) -> str:
        """Names the reward, or the kind of preview, whichever prevents a gradient."""
        if not self.reward.differentiable:
            return f"reward {self.reward.name}"
        given = {} if self.preview is None else vars(self.preview)
        settings = [f"{name}={setting}" for name, setting in given.items() if setting not in (None, False)]
        return f"{super().describe()} with {', '.join(settings)}"

    @abstractmethod
    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's preview, float32 [n]."""
