"""Statistics of a reward over all images of a run, exact across ranks and independent of the order of arrival."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from svdd.evaluation.metrics.gathered import GatheredMetric
from svdd.evaluation.metrics.intervals import bootstrap_interval, clustered, spread_within

__all__ = ["RewardStatistics"]


class RewardStatistics(GatheredMetric):
    r"""Count, mean, spread and quantiles of the scores that one reward gave.

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
    bootstrap interval of the mean, over prompts. Sums are exactly rounded (``math.fsum``), so the result does not
    depend on the order, batches or ranks in which scores arrive, and a resumed run reports the same bytes.

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
         'median': 3.0,
         'top10': 4.6, 'top20': 4.2, 'ci95_low': 1.8, 'ci95_high': 4.2}
    """

    higher_is_better = True
    scores: list[Tensor]
    prompts: list[Tensor]

    def __init__(self, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__({"scores": torch.float64, "prompts": torch.int64}, **kwargs)
        self.best_is_high = higher_is_better

    def update(self, scores: Tensor, prompts: Tensor | None = None) -> None:
        """Adds the scores of a batch.

        Args:
            scores: real [n], any floating or integer dtype, any device; n may be 0.
            prompts: The index of each image's prompt, at least 0, int64 [n]: the interval resamples prompts. Without
                it every image counts as a prompt of its own.

        Raises:
            ValueError: If `scores` is not one-dimensional, if a score is NaN or infinite, or if there is not one
                prompt for each.
        """
        if scores.ndim != 1:
            raise ValueError(f"scores must have the shape [n], got {list(scores.shape)}: give one score per image")
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(scores)} scores are NaN or infinite, expected finite numbers: "
                "check what the reward returns for these images"
            )
        own = torch.full((len(scores),), -1) if prompts is None else prompts.detach()
        if own.shape != scores.shape:
            raise ValueError(f"expected one prompt per score, got {len(own)} for {len(scores)}")
        self.scores.append(scores.detach().to(self.device, self.kept_as("scores"), copy=True))
        self.prompts.append(own.to(self.device, torch.int64, copy=True))
        # Merge equal sizes, as a binary counter carries: about log2(n) tensors, and every score is copied as often.
        while len(self.scores) > 1 and len(self.scores[-2]) <= len(self.scores[-1]):
            self.scores[-2:] = [torch.cat(self.scores[-2:])]
            self.prompts[-2:] = [torch.cat(self.prompts[-2:])]

    def compute(self) -> dict[str, Tensor]:
        """Computes the statistics over everything seen so far, on all ranks.

        Returns:
            ``count`` as int64 [], and ``mean``, ``std``, ``std_within``, ``standard_error``, ``min``, ``max``,
            ``median``, ``top10``, ``top20``, ``ci95_low`` and ``ci95_high`` as float64 [], on the CPU. Without scores
            all but the count are NaN; with a single one the spreads and the interval are.
        """
        values = dim_zero_cat(self.scores) if len(self.scores) else torch.zeros(0)
        ordered: list[float] = values.cpu().double().sort().values.tolist()
        count = len(ordered)
        mean = math.fsum(ordered) / count if count else math.nan
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in ordered) / (count - 1)) if count > 1 else math.nan
        prompts = dim_zero_cat(self.prompts).tolist() if count else []
        groups = clustered(values.tolist(), prompts)
        low, high = bootstrap_interval(groups)
        quantiles = {"min": 0.0, "max": 1.0, "median": 0.5}
        quantiles |= {"top10": 0.9, "top20": 0.8} if self.best_is_high else {"top10": 0.1, "top20": 0.2}
        statistics = {
            "mean": mean,
            "std": std,
            "std_within": spread_within(groups),
            "standard_error": std / math.sqrt(count) if count else math.nan,
            **{name: _quantile(ordered, q) for name, q in quantiles.items()},
            "ci95_low": low,
            "ci95_high": high,
        }
        result = {"count": torch.tensor(count)}
        return result | {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}


def _quantile(ordered: list[float], q: float) -> float:
    """Interpolates linearly between the two neighbours of position q (n - 1); NaN for an empty list."""
    if not ordered:
        return math.nan
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
