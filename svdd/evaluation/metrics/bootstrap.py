"""Confidence of a mean when numbers come in clusters: images of one prompt are more alike than those of two.

Source: Field and Welsh, Bootstrapping clustered data, 2007 (resampling of whole clusters).
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

__all__ = ["bootstrap_interval", "clustered", "spread_within"]

_DRAWS = 1000
_AT_ONCE = 2**18  # numbers that are drawn together: a few megabytes


def clustered(values: Sequence[float], clusters: Sequence[int]) -> list[list[float]]:
    """Returns the members of each cluster, in the order of the clusters' numbers.

    Args:
        values: n numbers.
        clusters: The cluster of each; who has a negative number is a cluster alone.
    """
    members: dict[int, list[float]] = defaultdict(list)
    alone = []
    for value, cluster in zip(values, clusters, strict=True):
        if cluster < 0:
            alone.append([value])
        else:
            members[cluster].append(value)
    return [members[cluster] for cluster in sorted(members)] + sorted(alone)


def spread_within(groups: Sequence[Sequence[float]]) -> float:
    """Returns the standard deviation around each cluster's own mean; NaN where no cluster has two members."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < 1:
        return math.nan
    means = [math.fsum(group) / len(group) for group in groups]
    squares = ((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group)
    return math.sqrt(math.fsum(squares) / freedom)


def bootstrap_interval(
    groups: Sequence[Sequence[float]], level: float = 0.95, draws: int = _DRAWS
) -> tuple[float, float]:
    """Returns the percentile interval of the mean over all members, from resampled clusters.

    The random numbers are the same every time, so that equal data give equal intervals. With fewer than about 10
    clusters such an interval is too narrow; where few are compared, take `svdd.evaluation.metrics.student_t`.

    Args:
        groups: The members of each cluster.
        level: Coverage, 0 .. 1.
        draws: Resampled data sets.

    Returns:
        Lower and upper end; NaN for fewer than two clusters.
    """
    size = len(groups)
    if size < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(0)
    total = torch.tensor([math.fsum(group) for group in groups], dtype=torch.float64)
    count = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    means = torch.empty(draws, dtype=torch.float64)  # beforehand: small leftovers would pin large blocks
    for start in range(0, draws, per := max(1, _AT_ONCE // size)):
        chosen = torch.randint(size, (min(per, draws - start), size), generator=generator)
        means[start : start + per] = total[chosen].sum(1) / count[chosen].sum(1)
    ends = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
