"""The reward after some deterministic steps: between the posterior mean and a full rollout."""

from torch import Tensor

from svdd import require_at_least
from svdd.state.state import State
from svdd.values.base import PreviewValue

__all__ = ["Lookahead"]


class Lookahead(PreviewValue):
    """The reward of the decoded x0 after k DDIM steps without noise; k = 0 is `PosteriorMean`.

    Costs 1 + min(k, T - 1 - i) denoiser rows for a row at step i; the next step reuses the first of them.

    Args:
        steps: k, the number of steps, >= 0.
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny.
    """

    def __init__(self, steps: int = 1, decoder: str | None = None) -> None:
        super().__init__(decoder)
        require_at_least(0, steps=steps)
        self.steps, self.most_rows = steps, 1 + steps

    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's image k steps ahead, float32 [n]."""
        for _ in range(min(self.steps, state.num_steps - state.i)):
            state = state.flow()
        return state.scores(self.reward, decode=self.preview_decoder)
