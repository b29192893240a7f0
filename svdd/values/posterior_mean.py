"""The reward of the posterior mean: SVDD-PM of Li et al., 2024, arXiv 2408.08252, as in DPS (arXiv 2209.14687)."""

from torch import Tensor

from svdd.diffusion.preview import Preview
from svdd.state.state import State
from svdd.values.base import PreviewValue

__all__ = ["PosteriorMean"]


class PosteriorMean(PreviewValue):
    """The reward of the decoded posterior mean: v(x) = r(decode(E[x_0 given x])).

    Needs no training. Costs one denoiser row per evaluated row, which the state keeps for the next step.

    Args:
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny.
        guidance_scale: Another weight of classifier-free guidance for previews; 1 (Z-Image: 0) saves the unconditional
            half.
        reuse_guidance: Take the effect of guidance from the parent, which saves the unconditional half.
        feature_depth: Recompute for previews only this many outermost layers at both ends of a UNet, or this many first
            and last blocks of a transformer, and take the features between from the parent.

    With one of the last three, each selected row is then denoised again in full: one more denoiser row.
    """

    def __init__(
        self,
        decoder: str | None = None,
        guidance_scale: float | None = None,
        reuse_guidance: bool = False,
        feature_depth: int | None = None,
    ) -> None:
        super().__init__(decoder, Preview(guidance_scale, reuse_guidance, feature_depth))

    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]."""
        x0 = None if self.preview is None else state.preview(self.preview)
        return state.scores(self.reward, x0, self.preview_decoder)
