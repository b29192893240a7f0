"""Statistics of a reward over all images of a run, exact across ranks and independent of the order of arrival."""

import math
from typing import Any

import torch
from torch import Tensor

from svdd.evaluation.metrics.gathered import GatheredMetric
from svdd.evaluation.metrics.intervals import bootstrap_interval, clustered, spread_within

__all__ = ["RewardStatistics"]


class RewardStatistics(GatheredMetric):
    r"""Count, mean, spread and quantiles of one reward's scores.

    With the scores sorted, $r_{(0)} \le \dots \le r_{(n-1)}$, and $h = q (n - 1)$,

    $$
    \bar r = \frac{1}{n} \sum_j r_j, \qquad
    s = \sqrt{\frac{1}{n-1} \sum_j (r_j - \bar r)^2}, \qquad
    \mathrm{SE} = \frac{s}{\sqrt n}, \qquad
    Q(q) = r_{(\lfloor h \rfloor)} + (h - \lfloor h \rfloor)\,(r_{(\lceil h \rceil)} - r_{(\lfloor h \rfloor)}).
    $$

    ``median`` is $Q(0.5)$; ``top10`` is $Q(0.9)$, the score that the best 10 % of the images reach, and ``top20`` is
    $Q(0.8)$; if lower is better, they are $Q(0.1)$ and $Q(0.2)$. ``std_within`` is the standard deviation around each
    prompt's own mean, the spread that a sampler can exploit. ``ci95_low`` and ``ci95_high`` are the ends of the 95 %
    bootstrap interval of the mean, over prompts. Sums are exactly rounded (``math.fsum``), so order, batches and ranks
    do not change the result by a bit.

    Args:
        higher_is_better: Whether the best images are those of the highest scores.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from svdd.evaluation.metrics import RewardStatistics
        >>> statistics = RewardStatistics()
        >>> statistics.update(torch.tensor([1.0, 2.0]))
        >>> statistics.update(torch.tensor([3.0, 4.0, 5.0]))
        >>> {name: round(value.item(), 4) for name, value in statistics.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'count': 5, 'mean': 3.0, 'std': 1.5811, 'std_within': nan, 'standard_error': 0.7071, 'min': 1.0, 'max': 5.0,
         'median': 3.0, 'top10': 4.6, 'top20': 4.2, 'ci95_low': 1.8, 'ci95_high': 4.2}
    """

    def __init__(self, higher_is_better: bool = True, **kwargs: Any) -> None:
        empty = {"scores": torch.zeros(0, dtype=torch.float64), "prompts": torch.zeros(0, dtype=torch.int64)}
        super().__init__(empty, **kwargs)
        self.best_is_high = higher_is_better

    def update(self, scores: Tensor, prompts: Tensor | None = None) -> None:
        """Adds the scores of a batch.

        Args:
            scores: real [n], any floating or integer dtype, any device; n may be 0.
            prompts: The index of each image's prompt, at least 0, int64 [n]; without it every image is a prompt.

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
        self.add("scores", scores)
        self.add("prompts", own)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``count``, int64 [], and the other statistics, float64 [], of all ranks, on the CPU.

        Without scores all but the count are NaN; with a single one the spreads and the interval are.
        """
        values: list[float] = self.rows("scores").double().tolist()
        ordered = sorted(values) or [math.nan]
        groups = clustered(values, self.rows("prompts").tolist())
        low, high = bootstrap_interval(groups)
        std = spread_within([ordered])
        statistics = {
            "mean": math.fsum(ordered) / len(ordered),
            "std": std,
            "std_within": spread_within(groups),
            "standard_error": std / math.sqrt(len(ordered)),
            "min": _quantile(ordered, 0.0),
            "max": _quantile(ordered, 1.0),
            "median": _quantile(ordered, 0.5),
            "top10": _quantile(ordered, 0.9 if self.best_is_high else 0.1),
            "top20": _quantile(ordered, 0.8 if self.best_is_high else 0.2),
            "ci95_low": low,
            "ci95_high": high,
        }
        doubles = {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}
        return {"count": torch.tensor(len(values))} | doubles


def _quantile(ordered: list[float], q: float) -> float:
    """Interpolates linearly between the two neighbours of position q (n - 1)."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
