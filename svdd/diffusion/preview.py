"""Cheaper predictions of x0, for candidates that differ from their evaluated parent by one step of noise.

Sources: Ma et al., DeepCache: Accelerating Diffusion Models for Free, 2023, arXiv 2312.00858 (deep features, reused
along time); Lv et al., FasterCache, 2024, arXiv 2410.19355 (the difference of guidance, reused along time). Reuse
between a parent and its candidates is an addition.
"""

import math
from dataclasses import dataclass

from svdd import require_at_least, require_numbers

__all__ = ["Preview"]


@dataclass(frozen=True)
class Preview:
    """How a preview of x0 is cheaper than the model's own prediction; ValueError for arguments out of range.

    Attributes:
        guidance_scale: Another weight of classifier-free guidance.
        reuse_guidance: Whether the effect of guidance is the parent's: the difference between its outputs with and
            without guidance is added to the candidate's conditional output.
        feature_depth: d, how much of the network is recomputed: the d outermost layers at both ends of a UNet, or the
            first and the last d blocks of a transformer. The features between are the parent's.
    """

    guidance_scale: float | None = None
    reuse_guidance: bool = False
    feature_depth: int | None = None

    def __post_init__(self) -> None:
        scale, depth = self.guidance_scale, self.feature_depth
        if scale is not None:
            require_numbers(guidance_scale=scale)
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, got {scale}")
        if scale is not None and self.reuse_guidance:
            raise ValueError(f"reuse_guidance keeps the model's own guidance; leave out guidance_scale={scale}")
        if depth is not None:
            require_at_least(1, feature_depth=depth)

    @property
    def reuses(self) -> bool:
        """Whether the parent's evaluation is needed."""
        return self.reuse_guidance or self.feature_depth is not None

    @property
    def changes(self) -> bool:
        """Whether any setting differs from the model's own prediction."""
        return self.reuses or self.guidance_scale is not None
