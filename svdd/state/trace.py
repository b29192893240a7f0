"""Every selection of a batch, per image: shows when a population collapses, and how far the sampler guided."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["STATISTICS", "Selection", "Trace", "count_distinct", "rounded"]

STATISTICS = ("choices", "resamplings", "spread", "ess", "alpha")  # of an image: see `Trace.statistics`


class Selection(NamedTuple):
    """One selection, for all images of a batch."""

    i: int  # step index of the candidate rows
    values: Tensor  # float [images, rows]; NaN for a row without a value, and to fill up images with fewer candidates
    kept: Tensor  # the rows that were kept, int64 [images, k]
    ancestors: Tensor  # distinct starting particles among the kept rows, int64 [images]
    ess: Tensor | None = None  # effective sample size of the weights, [images]; None without weights
    log_normaliser: Tensor | None = None  # increment of the estimate of log Z, [images], if the sampler makes one
    alpha: Tensor | None = None  # temperature of the weights, [images]; None without weights
    among_ends: bool = False  # whether the rows are ends of the chain
    screened_out: Tensor | int = 0  # rows without a value that could not be kept, [images]

    @property
    def choice(self) -> Tensor:
        """Whether an image's values differ, or a screening alone decided which rows stay, bool [images]."""
        differ = self.values.nan_to_num(-math.inf).amax(1) > self.values.nan_to_num(math.inf).amin(1)
        by_screening = (self._known <= self.kept.shape[1]) & (self.screened_out > 0)
        return (differ | by_screening).cpu()

    @property
    def change(self) -> Tensor:
        """Whether some rows of an image were dropped, bool [images]."""
        return (count_distinct(self.kept) < self._known + self.screened_out).cpu()

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the values of an image's rows, float64 [images]; NaN if there is one row."""
        values = self.values.double()
        squares = (values - values.nanmean(1, keepdim=True)).square()
        return (squares.nansum(1) / (self._known - 1)).sqrt().cpu()

    @property
    def competing(self) -> Tensor:
        """Rows with a value, float64 [images]; NaN if there is only one, where weights decide nothing."""
        return torch.where(self._known > 1, self._known.double(), math.nan)

    @property
    def _known(self) -> Tensor:
        """Rows with a value, int64 [images]."""
        return self.values.isnan().logical_not().sum(1)


@dataclass
class Trace:
    """The selections of one batch, in order.

    The expectation of `path_kl`, in nats, [images], is an upper bound on the divergence of the sampled law, that of
    paths and so of images, from the pretrained one; for shifted kernels it equals that of the paths. The number of one
    image is a single draw, and no bound unless all images have the same, as with the best of M. None: it is unknown.
    """

    selections: list[Selection] = field(default_factory=list)
    weights: Tensor | None = None  # normalised, of the rows that the sampler returned, [images, rows], if several
    path_kl: Tensor | float | None = 0.0

    def diverge(self, kl: Tensor | float | None) -> None:
        """Adds a divergence to `path_kl`; None makes the sum unknown."""
        self.path_kl = None if kl is None or self.path_kl is None else self.path_kl + kl

    def per_image(self, lineage: bool = False) -> list[dict[str, Any]]:
        """Returns each image's columns, with one entry per selection; `lineage` adds the index of each kept row."""
        steps = [selection.i for selection in self.selections]
        columns = [_columns(selection, lineage) for selection in self.selections]
        return [
            {"step": steps, **{name: [column[name][j] for column in columns] for name in columns[0]}}
            for j in range(len(self.selections[0].values) if columns else 0)
        ]

    def statistics(self, images: int) -> list[dict[str, float]]:
        """Returns what the selections came to, for each of so many images; unknown numbers are left out.

        - `choices`: selections among rows of different values, or of the rows that a screening left
        - `resamplings`: choices that dropped rows, other than the last one among ends of the chain
        - `spread`: standard deviation of the values at the last selection among several rows
        - `ess`: effective sample size as a share of the rows with a value, averaged over the selections with weights
          among several such rows
        - `alpha`: temperature of these weights, averaged over the selections where it is finite
        """
        every, none = self.selections, torch.zeros(images, dtype=torch.int64)
        inner = every[:-1] if every and every[-1].among_ends else every
        several = [each.spread for each in every if each.values.shape[1] > 1]
        columns = {
            "choices": sum((each.choice for each in every), none).tolist(),
            "resamplings": sum((each.choice & each.change for each in inner), none).tolist(),
            "spread": _mean(several[-1:], images),
            "ess": _mean([each.ess / each.competing for each in every if each.ess is not None], images),
            "alpha": _mean([each.alpha for each in every if each.alpha is not None], images),
        }
        return [
            {name: column[j] for name, column in columns.items() if math.isfinite(column[j])} for j in range(images)
        ]


def count_distinct(groups: Tensor) -> Tensor:
    """Returns how many different numbers each row of an integer matrix [g, k] holds, int64 [g]."""
    return 1 + groups.sort(1).values.diff().ne(0).sum(1)


def rounded(numbers: Tensor) -> list[float]:
    """Returns numbers, [n], rounded to seven significant digits, the precision of a float32."""
    return [float(f"{number:.7g}") for number in numbers.tolist()]


def _mean(selections: list[Tensor], images: int) -> list[float]:
    """Returns the mean over selections, [images] each, of the finite numbers, rounded; NaN where there is none."""
    numbers = torch.stack([torch.full((images,), torch.nan, dtype=torch.float64), *(each.cpu() for each in selections)])
    return rounded(torch.where(numbers.isfinite(), numbers, torch.nan).nanmean(0))


def _columns(selection: Selection, lineage: bool) -> dict[str, list[Any]]:
    values, missing = selection.values.double(), [None] * len(selection.values)
    columns = {
        "ess": missing if selection.ess is None else rounded(selection.ess),
        "log_normaliser": missing if selection.log_normaliser is None else rounded(selection.log_normaliser),
        "alpha": missing if selection.alpha is None else rounded(selection.alpha),
        "candidates": values.isnan().logical_not().sum(1).tolist(),
        "value_mean": rounded(values.nanmean(1)),
        "value_std": [number if math.isfinite(number) else None for number in rounded(selection.spread)],
        "value_max": rounded(values.nan_to_num(-math.inf).amax(1)),
        "value_chosen": rounded(values.gather(1, selection.kept).mean(1)),
        "ancestors": selection.ancestors.tolist(),
    }
    return columns | ({"lineage": selection.kept.tolist()} if lineage else {})
