"""The reward of the posterior mean: v_i(x_i) = r(E[x_0 given x_i]).

Source: Li et al., 2024, arXiv 2408.08252, SVDD-PM; the same estimate as in DPS (Chung et al., 2022, arXiv 2209.14687).
"""

import math

from torch import Tensor, nn

from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["PosteriorMean"]


class PosteriorMean(Value):
    """The reward of the decoded posterior mean: v(x) = r(decode(E[x_0 given x])).

    Needs no training. Costs one denoiser row per evaluated row, which the state keeps for the next step.

    Args:
        decoder: A smaller decoder for previews: `tiny`, a folder or a hub name of an AutoencoderTiny. Finished images
            are decoded by the model's own decoder.
        guidance_scale: Another weight of classifier-free guidance for previews; 1 saves the unconditional half. Each
            selected row is then denoised again at the model's own scale: one more denoiser row.

    Raises:
        ValueError: If `guidance_scale` is not finite.
    """

    def __init__(self, decoder: str | None = None, guidance_scale: float | None = None) -> None:
        super().__init__()
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        self.decoder, self.guidance_scale = decoder, guidance_scale
        self.most_rows = 1 if guidance_scale is None else 2
        self.preview_decoder: nn.Module | None = None

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the reward and loads the smaller decoder."""
        super().bind(reward, diffusion)
        self.preview_decoder = None if self.decoder is None else diffusion.load_decoder(self.decoder)

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether the reward is; a preview at another guidance scale does not depend on the model's own prediction."""
        return self.reward.differentiable and self.guidance_scale is None

    def describe(self) -> str:
        """Names what lacks a gradient."""
        if self.reward.differentiable:
            return f"value {type(self).__name__} with guidance_scale={self.guidance_scale}"
        return f"reward {self.reward.name}"

    def estimate(self, state: State) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]."""
        x0 = None if self.guidance_scale is None else state.preview(self.guidance_scale)
        return state.scores(self.reward, x0, self.preview_decoder)
