"""The colourfulness of an image.

Source: Hasler and Suesstrunk, Measuring colourfulness in natural images, 2003.
"""

import torch
from torch import Tensor

from svdd.rewards.base import Reward

__all__ = ["Colorfulness"]

_TINY = 1e-12  # keeps the gradient of a square root finite at 0


class Colorfulness(Reward):
    """Hasler and Suesstrunk's colourfulness: 0 is grey, 45 averagely, 82 highly and 109 extremely colourful.

    With rg = R - G and yb = (R + G) / 2 - B on 0 .. 255: sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).
    """

    differentiable = True
    range = (0.0, 257.0)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the colourfulness of each image, float32 [n]."""
        red, green, blue = (255 * images.float()).flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
        variance, mean = torch.var_mean(opponents, dim=2, correction=0)
        return (variance.sum(1) + _TINY).sqrt() + 0.3 * (mean.square().sum(1) + _TINY).sqrt()
