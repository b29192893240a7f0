"""Confidence of a mean of few independent numbers.

Sources: Student, The Probable Error of a Mean, 1908; Abramowitz and Stegun, Handbook of Mathematical Functions, 1964,
26.7.3 and 26.7.4 (the closed form for whole degrees of freedom).
"""

import math
from collections.abc import Sequence

__all__ = ["standard_error", "t_quantile"]

_MOST_FREEDOM = 10_000  # more change the quantile by less than 2e-4 of itself


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of independent numbers; NaN for fewer than two."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def t_quantile(level: float, freedom: int) -> float:
    """Returns the t that Student's T stays within, |T| <= t, with probability `level`.

    Args:
        level: Above 0 and below 1.
        freedom: Degrees of freedom; without any there is no bound.
    """
    if freedom < 1:
        return math.inf
    freedom = min(freedom, _MOST_FREEDOM)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """Returns P(|T| <= tan(angle) sqrt(freedom))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = total = (cosine if odd else 1.0) * (freedom > 1)
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
