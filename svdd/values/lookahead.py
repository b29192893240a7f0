"""The reward some deterministic steps ahead: between the posterior mean and a full roll-out."""

from torch import Tensor, nn

from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["Lookahead"]


class Lookahead(Value):
    """The reward of the decoded x0 after k DDIM steps without noise; k = 0 is `PosteriorMean`.

    Costs 1 + min(k, T - 1 - i) denoiser rows for a row at step i; the next step reuses the first of them. Early
    predictions are sharper, and fewer candidates fit into the same budget.

    Args:
        steps: k, the number of steps.
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny.

    Raises:
        ValueError: If `steps` is negative.
    """

    def __init__(self, steps: int = 1, decoder: str | None = None) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must be >= 0, got {steps}")
        self.steps, self.decoder, self.most_rows = steps, decoder, 1 + steps
        self.preview_decoder: nn.Module | None = None

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the reward and loads the smaller decoder."""
        super().bind(reward, diffusion)
        self.preview_decoder = None if self.decoder is None else diffusion.load_decoder(self.decoder)

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether the reward is differentiable."""
        return self.reward.differentiable

    def describe(self) -> str:
        """Names the reward, which decides whether there is a gradient."""
        return f"reward {self.reward.name}"

    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's image k steps ahead, float32 [n]."""
        for _ in range(self.steps):
            if state.done:
                break
            state = state.flow()
        return state.scores(self.reward, decode=self.preview_decoder)
