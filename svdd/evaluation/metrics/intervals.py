"""Statistics of weighted scores in clusters, such as the images of one prompt, and Student's t.

Sources: Cochran, Sampling Techniques, 1977, section 9A (the mean of all members of clusters of unequal size);
Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4 (Student's t in closed form for whole
degrees of freedom).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import cache

__all__ = ["clustered", "mean_of", "spread_within", "standard_error", "t_interval", "t_probability", "t_quantile"]

_MOST_FREEDOM = 10_000  # more degrees of freedom change the quantile by less than 2e-4 of itself

Weighted = tuple[float, float]  # a score and its weight


def clustered(weighted: Iterable[Weighted], clusters: Iterable[int]) -> list[list[Weighted]]:
    """Returns the members of each cluster; a negative number marks a cluster of one."""
    members: dict[Hashable, list[Weighted]] = defaultdict(list)
    for k, (pair, cluster) in enumerate(zip(weighted, clusters, strict=True)):
        members[cluster if cluster >= 0 else (k,)].append(pair)
    return list(members.values())


def mean_of(weighted: Sequence[Weighted]) -> float:
    """Returns the weighted mean; NaN without weight."""
    total = math.fsum(weight for _, weight in weighted)
    return math.fsum(weight * value for value, weight in weighted) / total if total else math.nan


def spread_within(groups: Sequence[Sequence[Weighted]]) -> float:
    """Returns the standard deviation around each cluster's own mean; NaN where no cluster has two members."""
    squares, freedom = [], []
    for group in groups:
        mean, total = mean_of(group), math.fsum(weight for _, weight in group)
        squares += [weight * (value - mean) ** 2 for value, weight in group]
        freedom += [total - math.fsum(weight**2 for _, weight in group) / total] if total else []
    return math.sqrt(math.fsum(squares) / math.fsum(freedom)) if math.fsum(freedom) > 0 else math.nan


def standard_error(groups: Sequence[Sequence[Weighted]]) -> float:
    """Returns the standard error of the mean over all members; NaN with fewer than two clusters.

    For clusters of equal size this is the standard deviation of their means over the root of their number.
    """
    count, mean = len(groups), mean_of([pair for group in groups for pair in group])
    if count < 2:
        return math.nan
    rests = (math.fsum(weight * (value - mean) for value, weight in group) for group in groups)
    size = math.fsum(weight for group in groups for _, weight in group) / count
    return math.sqrt(math.fsum(rest**2 for rest in rests) / (count - 1) / count) / size


def t_interval(mean: float, error: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Returns the interval of this level by Student's t of a mean over `count` clusters; NaN with fewer than two."""
    half = t_quantile(level, count - 1) * error
    return mean - half, mean + half


@cache
def t_quantile(level: float, freedom: int) -> float:
    """Returns t with P(|T| <= t) = `level`, in (0, 1), for Student's T; infinity without degrees of freedom."""
    if freedom < 1:
        return math.inf
    freedom = min(freedom, _MOST_FREEDOM)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def t_probability(t: float, freedom: int) -> float:
    """Returns P(|T| > |t|) for Student's T with at least one degree of freedom."""
    freedom = min(freedom, _MOST_FREEDOM)
    return max(0.0, 1 - _within(math.atan(abs(t) / math.sqrt(freedom)), freedom))


def _within(angle: float, freedom: int) -> float:
    """Returns P(|T| <= tan(angle) sqrt(freedom))."""
    cosine, odd = math.cos(angle), freedom % 2
    term = total = (cosine if odd else 1.0) * (freedom > 1)
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
