"""Distance between two sets of pictures in the features of an image model; FID and KID are those of torchmetrics.

Source: Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation, 2024,
arXiv 2401.09603 (CMMD: Gaussian kernel of width 10 on normalised CLIP embeddings, times 1000).
"""

import math
from typing import Any

import torch
from torch import Tensor

from svdd.evaluation.metrics.gathered import GatheredMetric

__all__ = ["CMMD"]

_WIDTH, _SCALE, _AT_ONCE = 10.0, 1000.0, 2048


class CMMD(GatheredMetric):
    """CLIP maximum mean discrepancy of two sets of images: 0 for equal sets; lower is closer.

    Examples:
        >>> import torch
        >>> cmmd = CMMD()
        >>> cmmd.update(torch.eye(3), real=True)
        >>> cmmd.update(torch.eye(3), real=False)
        >>> round(cmmd.compute().item(), 6)
        0.0
    """

    def __init__(self, **kwargs: Any) -> None:
        weights = {"real_weights": torch.zeros(0), "drawn_weights": torch.zeros(0)}
        super().__init__({"real": torch.zeros(0, 0), "drawn": torch.zeros(0, 0)} | weights, **kwargs)

    def update(self, features: Tensor, real: bool, weights: Tensor | None = None) -> None:
        """Adds features, float [n, d], to the reference (`real`) or to the other set; only directions count.

        `weights`, real [n], are the particles' shares in their images; by default every row is an image.
        """
        name = "real" if real else "drawn"
        self.add(name, features)
        self.add(f"{name}_weights", torch.ones(len(features)) if weights is None else weights)

    def compute(self) -> Tensor:
        """Returns the discrepancy, float64 [], on the CPU; NaN where a set is empty."""
        real, drawn = (
            (torch.nn.functional.normalize(self.rows(name).double(), dim=1), self.rows(f"{name}_weights").double())
            for name in ("real", "drawn")
        )
        if not len(real[0]) or not len(drawn[0]):
            return torch.tensor(math.nan, dtype=torch.float64)
        return _SCALE * (_mean_kernel(real, real) + _mean_kernel(drawn, drawn) - 2 * _mean_kernel(real, drawn))


def _mean_kernel(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the weighted mean of exp(-|a - b|^2 / (2 width^2)) over all pairs of features, in blocks."""
    total = one[0].new_zeros(())
    for a, a_weights in zip(*(part.split(_AT_ONCE) for part in one), strict=True):
        for b, b_weights in zip(*(part.split(_AT_ONCE) for part in other), strict=True):
            squared = (2 - 2 * a @ b.T).clamp(min=0)
            total = total + ((-squared / (2 * _WIDTH**2)).exp() * a_weights[:, None] * b_weights).sum()
    return total / (one[1].sum() * other[1].sum())
