"""The temperature `auto`: a multiple of the spread of an image's own values.

alpha has the unit of the reward, so a number that fits one reward is too large or too small for another. A multiple of
the standard deviation of the values among an image's rows fits every scale: with rewards of a r + b, a > 0, all
weights exp(r / alpha) keep their ratios. It depends on the image's own rows alone.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from svdd import described, is_number

__all__ = ["AUTO_MULTIPLE", "AUTO_START", "Alpha", "auto_alpha", "require_alpha", "temperature"]

Alpha = float | Literal["auto"]

AUTO_MULTIPLE = 0.5  # of the standard deviation: see benchmarks/temperature.md
AUTO_START = 1 / 3  # of the chain: earlier the spread of the values differs most from that of the rewards
_SMALLEST = 1e-6  # of the largest value: a smaller spread is the rounding of float32


def require_alpha(alpha: Alpha, zero: bool, auto: bool = True) -> None:
    """Raises ValueError unless alpha is a positive number, or with `zero` 0, or with `auto` the word `auto`."""
    expected = f"alpha must be {'>= 0' if zero else '> 0'}{' or auto' if auto else ''}"
    if isinstance(alpha, str) and alpha == "auto":
        if not auto:
            raise ValueError(f"{expected}, got auto, which needs more than two values to compare; give a number")
    elif not is_number(alpha):
        raise ValueError(f"{expected}, got {described(alpha)}")
    elif not (alpha >= 0 if zero else alpha > 0):
        hint = "" if zero or alpha != 0 else "; for the limit of alpha = 0 use SVDD"
        raise ValueError(f"{expected}, got {alpha}{hint}")


def auto_alpha(values: Tensor) -> Tensor:
    """Returns each image's temperature, float64 [images, 1], from values [images, rows]; infinity if they are equal."""
    alphas = [[_alpha(row)] for row in values.tolist()]
    return torch.tensor(alphas, dtype=torch.float64, device=values.device)


def _alpha(values: list[float]) -> float:
    """Returns the temperature of one image; exactly rounded sums do not depend on the batch, as a tensor's may."""
    values = [value for value in values if value != -math.inf]  # rows without a value do not compete
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) * (value - mean) for value in values) / max(n - 1, 1))
    return AUTO_MULTIPLE * spread if spread > _SMALLEST * max(map(abs, values)) else math.inf


def temperature(alpha: Alpha, values: Tensor) -> float | Tensor:
    """Returns alpha itself, or for `auto` that of each image, [images, 1], from values [images, rows]."""
    return auto_alpha(values) if alpha == "auto" else alpha
