"""Statistics of a reward over all images of a run, exact across ranks and independent of the order of arrival."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["RewardStatistics"]


class RewardStatistics(Metric):
    r"""Count, mean, spread and quantiles of the scores that one reward gave.

    With the scores sorted, $r_{(0)} \le \dots \le r_{(n-1)}$, and $h = q (n - 1)$,

    $$
    \bar r = \frac{1}{n} \sum_j r_j, \qquad
    s = \sqrt{\frac{1}{n-1} \sum_j (r_j - \bar r)^2}, \qquad
    \mathrm{SE} = \frac{s}{\sqrt n}, \qquad
    Q(q) = r_{(\lfloor h \rfloor)} + (h - \lfloor h \rfloor)\,(r_{(\lceil h \rceil)} - r_{(\lfloor h \rfloor)}).
    $$

    ``median`` is $Q(0.5)$; ``top10`` is $Q(0.9)$, the score that the best 10 % of the images reach, and ``top20`` is
    $Q(0.8)$; the best is the highest. Sums are exactly rounded (``math.fsum``), so the result does not depend on
    the order, the batches or the ranks in which scores arrived: a resumed run reports the same bytes.

    Args:
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from svdd.metrics import RewardStatistics
        >>> statistics = RewardStatistics()
        >>> statistics.update(torch.tensor([1.0, 2.0]))
        >>> statistics.update(torch.tensor([3.0, 4.0, 5.0]))
        >>> {name: round(value.item(), 4) for name, value in statistics.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'count': 5, 'mean': 3.0, 'std': 1.5811, 'standard_error': 0.7071, 'min': 1.0, 'max': 5.0, 'median': 3.0,
         'top10': 4.6, 'top20': 4.2}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor) -> None:
        """Adds the scores of a batch.

        Args:
            scores: real [n], any floating or integer dtype, any device; n may be 0.

        Raises:
            ValueError: If `scores` is not one-dimensional, or if a score is NaN or infinite.
        """
        if scores.ndim != 1:
            raise ValueError(f"scores must have the shape [n], got {list(scores.shape)}: give one score per image")
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(scores)} scores are NaN or infinite, expected finite numbers: "
                "check what the reward returns for these images"
            )
        self.scores.append(scores.detach().to(self.device, self._storage_dtype, copy=True))
        # Merge equal sizes, as a binary counter carries: about log2(n) tensors, and every score is copied as often.
        while len(self.scores) > 1 and len(self.scores[-2]) <= len(self.scores[-1]):
            self.scores[-2:] = [torch.cat(self.scores[-2:])]

    def compute(self) -> dict[str, Tensor]:
        """Computes the statistics over everything seen so far, on all ranks.

        Returns:
            ``count`` as int64 [], and ``mean``, ``std``, ``standard_error``, ``min``, ``max``, ``median``, ``top10``
            and ``top20`` as float64 [], on the CPU. Without scores all but the count are NaN; with a single one
            ``std`` and ``standard_error`` are.
        """
        values = dim_zero_cat(self.scores) if len(self.scores) else torch.zeros(0)
        ordered: list[float] = values.cpu().double().sort().values.tolist()
        count = len(ordered)
        mean = math.fsum(ordered) / count if count else math.nan
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in ordered) / (count - 1)) if count > 1 else math.nan
        statistics = {
            "mean": mean,
            "std": std,
            "standard_error": std / math.sqrt(count) if count else math.nan,
            "min": _quantile(ordered, 0.0),
            "max": _quantile(ordered, 1.0),
            "median": _quantile(ordered, 0.5),
            "top10": _quantile(ordered, 0.9),
            "top20": _quantile(ordered, 0.8),
        }
        result = {"count": torch.tensor(count)}
        return result | {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the scores of all ranks; a rank without scores joins with an empty tensor of the same dtype."""
        if not len(self.scores):
            self.scores.append(torch.zeros(0, dtype=self._storage_dtype, device=self.device))
        super().sync(*args, **kwargs)

    @property
    def _storage_dtype(self) -> torch.dtype:
        """float64 where the device has it; Apple's MPS has not, and none of its scores needs it."""
        return torch.float32 if self.device.type == "mps" else torch.float64


def _quantile(ordered: list[float], q: float) -> float:
    """Interpolates linearly between the two neighbours of position q (n - 1); NaN for an empty list."""
    if not ordered:
        return math.nan
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
