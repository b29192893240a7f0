"""Every selection of a batch, per image: shows when a population collapses, and how far the sampler guided."""

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Selection", "Trace", "count_distinct"]


class Selection(NamedTuple):
    """One selection, for all images of a batch.

    Args:
        i: Step index of the candidate rows.
        values: float [images, rows].
        kept: The rows that were kept, int64 [images, k].
        ancestors: Distinct starting particles among the kept rows, int64 [images].
        ess: Effective sample size of the weights, [images]; None without weights.
        log_normaliser: Increment of the estimate of log Z, [images]; None where the sampler makes no estimate.
    """

    i: int
    values: Tensor
    kept: Tensor
    ancestors: Tensor
    ess: Tensor | None = None
    log_normaliser: Tensor | None = None


class Trace:
    """The selections of one batch, in order.

    Attributes:
        selections: One entry per selection.
        weights: Normalised weights of the rows that the sampler returned, [images, rows]; None where it returned one.
        path_kl: Divergence of each image's path from the pretrained chain, in nats, [images]: an upper bound for a
            selection among candidates, exact in expectation for a shifted kernel. 0.0 until something guides; None
            once something guided without stating its divergence.
    """

    def __init__(self) -> None:
        self.selections: list[Selection] = []
        self.weights: Tensor | None = None
        self.path_kl: Tensor | float | None = 0.0

    def diverge(self, kl: Tensor | float | None) -> None:
        """Adds a divergence to `path_kl`; None makes the sum unknown."""
        self.path_kl = None if kl is None or self.path_kl is None else self.path_kl + kl

    def per_image(self, lineage: bool = False) -> list[dict[str, Any]]:
        """Returns the columns of each image's trace: plain lists with one entry per selection.

        Args:
            lineage: Include the index of the row that each kept row comes from.
        """
        if not self.selections:
            return []
        columns = [_columns(selection, lineage) for selection in self.selections]
        return [
            {
                "step": [selection.i for selection in self.selections],
                **{name: [c[name][j] for c in columns] for name in columns[0]},
            }
            for j in range(len(self.selections[0].values))
        ]


def count_distinct(groups: Tensor) -> Tensor:
    """Returns how many different numbers each line of an integer matrix [g, k] holds, int64 [g]."""
    ordered = groups.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


def _columns(selection: Selection, lineage: bool) -> dict[str, list[Any]]:
    values, index = selection.values.double(), selection.kept
    missing = [None] * len(values)
    columns = {
        "ess": missing if selection.ess is None else _rounded(selection.ess),
        "log_normaliser": missing if selection.log_normaliser is None else _rounded(selection.log_normaliser),
        "value_mean": _rounded(values.mean(1)),
        "value_max": _rounded(values.max(1).values),
        "value_chosen": _rounded(values.gather(1, index).mean(1)),
        "ancestors": selection.ancestors.tolist(),
    }
    return columns | ({"lineage": index.tolist()} if lineage else {})


def _rounded(numbers: Tensor) -> list[float]:
    return [float(f"{number:.7g}") for number in numbers.tolist()]
