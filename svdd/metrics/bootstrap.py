"""Confidence of a mean when numbers come in clusters: images of one prompt are more alike than those of two.

Source: Field and Welsh, Bootstrapping clustered data, 2007 (resampling of whole clusters).
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

__all__ = ["bootstrap_interval", "cluster_sums"]

_DRAWS = 1000
_AT_ONCE = 2**22  # numbers that are drawn together


def cluster_sums(values: Sequence[float], clusters: Sequence[int]) -> tuple[list[float], list[int]]:
    """Returns the sum and the number of the members of each cluster, in the order of the clusters' numbers.

    Args:
        values: n numbers.
        clusters: The cluster of each; who has a negative number is a cluster alone.
    """
    members: dict[int, list[float]] = defaultdict(list)
    alone: list[float] = []
    for value, cluster in zip(values, clusters, strict=True):
        (members[cluster] if cluster >= 0 else alone).append(value)
    groups = [members[cluster] for cluster in sorted(members)] + [[value] for value in sorted(alone)]
    return [math.fsum(group) for group in groups], [len(group) for group in groups]


def bootstrap_interval(
    sums: Sequence[float], counts: Sequence[int], level: float = 0.95, draws: int = _DRAWS
) -> tuple[float, float]:
    """Returns the percentile interval of the mean over all members, from resampled clusters.

    The random numbers are the same every time, so that equal data give equal intervals. With fewer than about 10
    clusters such an interval is too narrow.

    Args:
        sums: The sum of each cluster.
        counts: The members of each cluster.
        level: Coverage, 0 .. 1.
        draws: Resampled data sets.

    Returns:
        Lower and upper end; NaN for fewer than two clusters.
    """
    size = len(sums)
    if size < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(0)
    total, count = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    means = []
    for start in range(0, draws, per := max(1, _AT_ONCE // size)):
        chosen = torch.randint(size, (min(per, draws - start), size), generator=generator)
        means.append(total[chosen].sum(1) / count[chosen].sum(1))
    ends = torch.cat(means).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
