"""The reward of the posterior mean: SVDD-PM of Li et al., 2024, arXiv 2408.08252, as in DPS (arXiv 2209.14687)."""

from torch import Tensor

from svdd.state.state import State
from svdd.values.base import PreviewValue

__all__ = ["PosteriorMean"]


class PosteriorMean(PreviewValue):
    """The reward of the decoded posterior mean: v(x) = r(decode(E[x_0 given x])).

    Needs no training. Costs one denoiser row per evaluated row, which the state keeps for the next step.

    Args:
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny.
        guidance_scale: Another weight of classifier-free guidance for previews; 1 (Z-Image: 0) saves the unconditional
            half. Each selected row is then denoised again at the model's own scale: one more denoiser row.
    """

    def __init__(self, decoder: str | None = None, guidance_scale: float | None = None) -> None:
        super().__init__(decoder, guidance_scale)
        self.most_rows = 1 if guidance_scale is None else 2

    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]."""
        x0 = None if self.guidance_scale is None else state.preview(self.guidance_scale)
        return state.scores(self.reward, x0, self.preview_decoder)
