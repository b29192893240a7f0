"""Statistics of a reward over all images of a run, exact across ranks and independent of the order of arrival."""

import math
from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from svdd.evaluation.metrics.gathered import GatheredMetric
from svdd.evaluation.metrics.intervals import (
    Weighted,
    clustered,
    mean_of,
    spread_within,
    standard_error,
    t_interval,
)

__all__ = ["RewardStatistics"]


class RewardStatistics(GatheredMetric):
    r"""Count, mean, spread and quantiles of one reward's scores.

    Each of the $n$ scores $r_j$ has a weight $w_j$: 1, or a particle's share of its image, so that the weights of an
    image sum to 1. With the images of $P$ prompts, of which $J_p$ are those of prompt $p$,

    $$
    \bar r = \frac{\sum_j w_j r_j}{\sum_j w_j}, \qquad
    s^2 = \frac{\sum_j w_j (r_j - \bar r)^2}{\sum_j w_j - \sum_j w_j^2 / \sum_j w_j}, \qquad
    \mathrm{SE}^2 = \frac{P}{P-1} \sum_p \Big(\frac{\sum_{j \in J_p} w_j (r_j - \bar r)}{\sum_j w_j}\Big)^2.
    $$

    ``mean`` is $\bar r$, over images; ``std`` is $s$. ``standard_error`` treats the prompts as a sample and allows for
    the correlation of a prompt's images. If all prompts have the same number of images, it is the standard deviation of
    their means divided by $\sqrt P$. ``ci95_low`` and ``ci95_high`` are $\bar r \mp t\,\mathrm{SE}$, with the 95 %
    quantile of Student's t for $P - 1$ degrees of freedom. ``std_within`` is the standard deviation around each
    prompt's own mean, the spread that a sampler can exploit.

    Without weights and with the scores sorted, $r_{(0)} \le \dots \le r_{(n-1)}$, and $h = q (n - 1)$, the quantile is
    $Q(q) = r_{(\lfloor h \rfloor)} + (h - \lfloor h \rfloor)\,(r_{(\lceil h \rceil)} - r_{(\lfloor h \rfloor)})$;
    with weights, neighbours lie the mean of their weights apart instead of 1. ``median`` is $Q(0.5)$; ``top10`` is
    $Q(0.9)$, the score that the best 10 % of the images reach, and ``top20`` is $Q(0.8)$; if lower is better, they are
    $Q(0.1)$ and $Q(0.2)$. Sums are exactly rounded (``math.fsum``), so order, batches and ranks do not change the
    result by a bit.

    Args:
        higher_is_better: Whether the best images are those of the highest scores.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from svdd.evaluation.metrics import RewardStatistics
        >>> statistics = RewardStatistics()
        >>> statistics.update(torch.tensor([1.0, 2.0]))
        >>> statistics.update(torch.tensor([3.0, 4.0, 5.0]))
        >>> {name: round(value.item(), 4) for name, value in statistics.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'count': 5, 'mean': 3.0, 'std': 1.5811, 'std_within': nan, 'standard_error': 0.7071, 'min': 1.0, 'max': 5.0,
         'median': 3.0, 'top10': 4.6, 'top20': 4.2, 'ci95_low': 1.0368, 'ci95_high': 4.9632}
    """

    def __init__(self, higher_is_better: bool = True, **kwargs: Any) -> None:
        empty = {name: torch.zeros(0, dtype=torch.float64) for name in ("scores", "weights")}
        empty["prompts"] = torch.zeros(0, dtype=torch.int64)
        super().__init__(empty, **kwargs)
        self.best_is_high = higher_is_better

    def update(self, scores: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds the scores of a batch.

        Args:
            scores: real [n], any floating or integer dtype, any device; n may be 0.
            prompts: The index of each image's prompt, at least 0, int64 [n]; without it every image is a prompt.
            weights: The share of each score in its image, at least 0, real [n]; by default every score is an image.

        Raises:
            ValueError: If a shape is wrong, or a score is NaN or infinite.
        """
        if scores.ndim != 1:
            raise ValueError(f"scores must have the shape [n], got {list(scores.shape)}: give one score per image")
        if bad := int((~torch.isfinite(scores)).sum()):
            raise ValueError(f"{bad} of {len(scores)} scores are NaN or infinite; check what the reward returns")
        own = torch.full((len(scores),), -1) if prompts is None else prompts
        if own.shape != scores.shape:
            raise ValueError(f"expected one prompt per score, got {len(own)} for {len(scores)}")
        own_weights = torch.ones(len(scores)) if weights is None else weights
        if own_weights.shape != scores.shape or not bool((own_weights >= 0).all()):
            raise ValueError(f"expected one weight >= 0 per score, got {own_weights.tolist()} for {len(scores)}")
        self.add("scores", scores)
        self.add("weights", own_weights)
        self.add("prompts", own)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``count``, int64 [], and the other statistics, float64 [], of all ranks, on the CPU.

        Without scores all but the count are NaN; with a single one the spreads are, and with a single prompt the
        standard error and the interval.
        """
        scores: list[float] = self.rows("scores").double().tolist()
        pairs: list[Weighted] = list(zip(scores, self.rows("weights").double().tolist(), strict=True))
        groups = clustered(pairs, self.rows("prompts").tolist())
        ordered = sorted(pair for pair in pairs if pair[1] > 0) or [(math.nan, 1.0)]
        mean, error = mean_of(ordered), standard_error(groups)
        low, high = t_interval(mean, error, len(groups))
        statistics = {
            "mean": mean,
            "std": spread_within([ordered]),
            "std_within": spread_within(groups),
            "standard_error": error,
            "min": ordered[0][0],
            "max": ordered[-1][0],
            "median": _quantile(ordered, 0.5),
            "top10": _quantile(ordered, 0.9 if self.best_is_high else 0.1),
            "top20": _quantile(ordered, 0.8 if self.best_is_high else 0.2),
            "ci95_low": low,
            "ci95_high": high,
        }
        doubles = {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}
        return {"count": torch.tensor(len(scores))} | doubles


def _quantile(ordered: list[Weighted], q: float) -> float:
    """Interpolates linearly between the two neighbours of the fraction q of the way from the first to the last."""
    places = [0.0, *accumulate((one + other) / 2 for (_, one), (_, other) in pairwise(ordered))]
    position = q * places[-1]
    below = bisect_right(places, position) - 1
    above = min(below + 1, len(ordered) - 1)
    part = (position - places[below]) / (places[above] - places[below]) if above > below else 0.0
    return ordered[below][0] + part * (ordered[above][0] - ordered[below][0])
