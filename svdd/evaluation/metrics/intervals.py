"""Confidence intervals of a mean: of numbers in clusters, such as images of one prompt, and of independent numbers.

Sources: Field and Welsh, Bootstrapping clustered data, 2007 (resampling of whole clusters); Abramowitz and Stegun,
Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4 (Student's t in closed form for whole degrees of freedom).
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

__all__ = ["bootstrap_interval", "clustered", "spread_within", "t_quantile"]

_DRAWS = 1000
_AT_ONCE = 2**18  # random numbers drawn at once: a few megabytes
_MOST_FREEDOM = 10_000  # more degrees of freedom change the quantile by less than 2e-4 of itself


def clustered(values: Sequence[float], clusters: Sequence[int]) -> list[list[float]]:
    """Returns the members of each cluster, in the order of their numbers; a negative one marks a cluster of one."""
    members: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for k, (value, cluster) in enumerate(zip(values, clusters, strict=True)):
        members[(cluster,) if cluster >= 0 else (math.inf, value, k)].append(value)
    return [members[key] for key in sorted(members)]


def spread_within(groups: Sequence[Sequence[float]]) -> float:
    """Returns the standard deviation around each cluster's own mean; NaN where no cluster has two members."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < 1:
        return math.nan
    means = [math.fsum(group) / len(group) for group in groups]
    squares = ((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group)
    return math.sqrt(math.fsum(squares) / freedom)


def bootstrap_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the 95 % percentile interval of the mean over all members, from 1000 resamplings of the clusters.

    The random numbers are the same every time, so that equal data give equal intervals. With fewer than about 10
    clusters the interval is too narrow; use `t_quantile` instead. With fewer than two both ends are NaN.
    """
    size = len(groups)
    if size < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(0)
    total = torch.tensor([math.fsum(group) for group in groups], dtype=torch.float64)
    count = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    means = torch.empty(_DRAWS, dtype=torch.float64)  # allocated first: small tensors would pin large blocks
    for start in range(0, _DRAWS, per := max(1, _AT_ONCE // size)):
        chosen = torch.randint(size, (min(per, _DRAWS - start), size), generator=generator)
        means[start : start + per] = total[chosen].sum(1) / count[chosen].sum(1)
    low, high = means.quantile(torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=torch.float64)).tolist()
    return low, high


def t_quantile(level: float, freedom: int) -> float:
    """Returns t with P(|T| <= t) = `level`, in (0, 1), for Student's T; infinity without degrees of freedom."""
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
