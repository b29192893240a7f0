"""The reward some deterministic steps ahead: between the posterior mean and a full roll-out."""

from torch import Tensor, nn

from svdd.diffusion.base import Diffusion
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["Lookahead"]


class Lookahead(Value):
    """The reward of the decoded x0 after k DDIM steps without noise; k = 0 is `PosteriorMean`.

    Costs 1 + min(k, T - 1 - i) denoiser rows for a row at step i, of which the next step reuses the first. It sees a
    sharper picture early on, at the price of as many candidates.

    Args:
        steps: k, how far to look ahead.
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny.

    Raises:
        ValueError: If `steps` is negative.
    """

    def __init__(self, steps: int = 1, decoder: str | None = None) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must be >= 0, got {steps}")
        self.steps, self.decoder = steps, decoder
        self.most_rows = 1 + steps
        self.preview_decoder: nn.Module | None = None

    def prepare(self, diffusion: Diffusion) -> None:
        """Loads the smaller decoder."""
        if self.decoder is not None:
            self.preview_decoder = diffusion.load_decoder(self.decoder)

    @property
    def differentiable(self) -> bool:
        """Whether the reward is."""
        return self.reward.differentiable

    def describe(self) -> str:
        """Names the reward: it is what may lack a gradient."""
        return f"reward {self.reward.name}"

    def forward(self, state: State) -> Tensor:
        """Returns the reward of what each row runs towards, float32 [n]; at the end of the chain that of its image."""
        if state.done:
            return state.scores(self.reward)
        ahead = state
        for _ in range(self.steps):
            if ahead.done:
                break
            ahead = ahead.flow()
        return ahead.scores(self.reward, decode=self.preview_decoder)
