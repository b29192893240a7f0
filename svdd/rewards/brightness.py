"""The brightness of an image."""

from torch import Tensor

from svdd.rewards.base import Reward
from svdd.rewards.models.pixels import luma

__all__ = ["Brightness"]


class Brightness(Reward):
    """Mean luma, 0 (black) to 1 (white)."""

    differentiable = True
    range = (0.0, 1.0)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the brightness of each image, float32 [n]."""
        return luma(images).mean((1, 2))
