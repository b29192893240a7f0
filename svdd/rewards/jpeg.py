"""The size of an image as a JPEG file.

Source: the compressibility rewards of Black et al., Training Diffusion Models with Reinforcement Learning, 2023,
arXiv 2305.13301: quality 95, 1 kB = 1000 bytes.
"""

import io
import math

import torch
from torch import Tensor

from svdd.rewards.base import CORES, Reward
from svdd.rewards.models.pixels import to_pil

__all__ = ["Compressibility", "Incompressibility"]


def _kilobytes(images: Tensor) -> Tensor:
    sizes = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class Compressibility(Reward):
    """Minus the JPEG file size in kB (quality 95): simple, smooth images score high."""

    range, one_call, threads, takes_bytes = (-math.inf, 0.0), True, CORES, True

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns minus the size of each image in kB, float32 [n]."""
        return -_kilobytes(images)


class Incompressibility(Reward):
    """The JPEG file size in kB (quality 95): busy, detailed images score high."""

    range, one_call, threads, takes_bytes = (0.0, math.inf), True, CORES, True

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the size of each image in kB, float32 [n]."""
        return _kilobytes(images)
