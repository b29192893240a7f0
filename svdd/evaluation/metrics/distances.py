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

    Example:
        >>> import torch
        >>> cmmd = CMMD()
        >>> cmmd.update(torch.eye(3), real=True)
        >>> cmmd.update(torch.eye(3), real=False)
        >>> round(cmmd.compute().item(), 6)
        0.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"real": torch.zeros(0, 0), "drawn": torch.zeros(0, 0)}, **kwargs)

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features, float [n, d], to the reference (`real`) or to the other set; only directions count."""
        self.add("real" if real else "drawn", features)

    def compute(self) -> Tensor:
        """Returns the discrepancy, float64 [], on the CPU; NaN where a set is empty."""
        real, drawn = (torch.nn.functional.normalize(self.rows(name).double(), dim=1) for name in ("real", "drawn"))
        if not len(real) or not len(drawn):
            return torch.tensor(math.nan, dtype=torch.float64)
        return _SCALE * (_mean_kernel(real, real) + _mean_kernel(drawn, drawn) - 2 * _mean_kernel(real, drawn))


def _mean_kernel(one: Tensor, other: Tensor) -> Tensor:
    """Returns the mean of exp(-|a - b|^2 / (2 width^2)) over all pairs, in blocks."""
    total = one.new_zeros(())
    for a in one.split(_AT_ONCE):
        for b in other.split(_AT_ONCE):
            squared = (2 - 2 * a @ b.T).clamp(min=0)
            total = total + (-squared / (2 * _WIDTH**2)).exp().sum()
    return total / (len(one) * len(other))
