"""How sharp a picture is.

Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, 2000 (variance of the Laplacian).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from svdd.rewards.base import Reward
from svdd.rewards.pixels import luma

__all__ = ["Sharpness"]


class Sharpness(Reward):
    """Variance of the Laplacian of the luma on 0 .. 255: 0 for a flat picture, thousands for one full of edges."""

    differentiable = True
    range = (0.0, 1020.0**2)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the sharpness of each image, float32 [n]."""
        kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).float()
        edges = F.conv2d(255 * luma(images)[:, None], kernel[None, None])
        return edges.flatten(1).var(dim=1, correction=0)
