"""Spatial frequencies of latents, in an orthonormal basis: standard normal latents have standard normal coefficients.

Source: Ahmed, Natarajan and Rao, Discrete Cosine Transform, IEEE Transactions on Computers, 1974 (DCT-II).
"""

import math

import torch
from torch import Tensor

__all__ = ["from_frequencies", "low_pass", "to_frequencies"]


def to_frequencies(x: Tensor) -> Tensor:
    """Returns the coefficients of the orthonormal DCT-II over the last two axes of x, at least float32, [..., h, w]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _basis(x, -2) @ x @ _basis(x, -1).mT


def from_frequencies(coefficients: Tensor) -> Tensor:
    """Inverts `to_frequencies`."""
    return _basis(coefficients, -2).mT @ coefficients @ _basis(coefficients, -1)


def low_pass(x: Tensor, share: float) -> Tensor:
    """Returns the part of x, [images, rows, ..., h, w], in the lowest share of the frequencies of both axes.

    At least one frequency of each axis stays. Images are transformed one by one, so that none depends on the others.
    """
    if share == 1:
        return x
    rows, columns = (torch.arange(size, device=x.device) < max(1, round(share * size)) for size in x.shape[-2:])
    kept = rows[:, None] & columns
    return torch.stack([from_frequencies(kept * to_frequencies(image)) for image in x]).to(x)


def _basis(x: Tensor, axis: int) -> Tensor:
    """Returns the matrix of the transform of one axis, [frequencies, positions]."""
    size = x.shape[axis]
    grid = torch.arange(size, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi / size * grid[:, None] * (grid + 0.5)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.to(x)
