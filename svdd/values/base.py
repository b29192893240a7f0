"""The interface of every value."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.state.state import State

__all__ = ["Value"]


class Value(nn.Module, ABC):
    """Estimates the soft value v_i(x_i) = alpha log E[exp(r(x_0) / alpha) given x_i] of every row.

    A subclass implements `estimate`. Call `bind` once before the first evaluation; `GuidedDiffusion` does.

    Attributes:
        most_rows: Maximum denoiser rows per evaluation of one row.
        differentiable: Whether gradients flow from the estimate to the latents.
    """

    most_rows: int = 1
    differentiable: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._bound: tuple[Reward, ...] = ()  # a tuple, so that the reward is not registered a second time

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the guide reward. Subclasses extend it to build or load what depends on the diffusion model."""
        self._bound = (reward,)

    @property
    def reward(self) -> Reward:
        """The bound reward.

        Raises:
            UserError: If none was bound.
        """
        if not self._bound:
            raise UserError(f"{type(self).__name__} has no reward yet: call value.bind(reward, diffusion) first")
        return self._bound[0]

    def describe(self) -> str:
        """Names the value for an error message."""
        return f"value {type(self).__name__}"

    @abstractmethod
    def estimate(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; only called before the end of the chain, i < T."""

    def forward(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; at the end of the chain the reward itself."""
        return state.scores(self.reward) if state.done else self.estimate(state)
