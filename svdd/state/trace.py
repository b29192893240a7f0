"""What was known at every choice of a run, per image, so that collapse can be seen."""

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Choice", "Trace"]


class Choice(NamedTuple):
    """One choice, of all images of a batch.

    Args:
        i: Step index of the rows that were chosen from.
        values: float [images, rows].
        kept: The rows that were kept, int64 [images, k].
        ancestors: Distinct starting particles among the kept rows, int64 [images].
        ess: Effective sample size of the weights, [images]; None where the choice has no weights.
        log_normaliser: Increment of the estimate of log Z, [images]; None where the sampler makes none.
    """

    i: int
    values: Tensor
    kept: Tensor
    ancestors: Tensor
    ess: Tensor | None = None
    log_normaliser: Tensor | None = None


class Trace:
    """The choices of one batch, in order.

    Attributes:
        choices: One entry per choice.
        weights: Normalised weights of the rows that the sampler returned, [images, rows]; None where it returned one.
        path_kl: How far the law of each image's path was moved from the pretrained chain's, in nats, [images]: an upper
            bound where the sampler chooses between candidates, exact in the mean where it shifts the kernel.
    """

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.weights: Tensor | None = None
        self.path_kl: Tensor | float = 0.0

    def per_image(self, lineage: bool = False) -> list[dict[str, Any]]:
        """Returns the columns of each image's trace: plain lists with one entry per choice.

        Args:
            lineage: Also tell which row each kept row comes from.
        """
        if not self.choices:
            return []
        columns = [_columns(choice, lineage) for choice in self.choices]
        return [
            {
                "step": [choice.i for choice in self.choices],
                **{name: [c[name][j] for c in columns] for name in columns[0]},
            }
            for j in range(len(self.choices[0].values))
        ]


def count_distinct(groups: Tensor) -> Tensor:
    """Returns how many different numbers each line of an integer matrix [g, k] holds, int64 [g]."""
    ordered = groups.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


def _columns(choice: Choice, lineage: bool) -> dict[str, list[Any]]:
    values, index = choice.values.double(), choice.kept
    images = len(values)
    columns = {
        "ess": [None] * images if choice.ess is None else _rounded(choice.ess),
        "log_normaliser": [None] * images if choice.log_normaliser is None else _rounded(choice.log_normaliser),
        "value_mean": _rounded(values.mean(1)),
        "value_max": _rounded(values.max(1).values),
        "value_chosen": _rounded(values.gather(1, index).mean(1)),
        "ancestors": choice.ancestors.tolist(),
    }
    return columns | ({"lineage": index.tolist()} if lineage else {})


def _rounded(numbers: Tensor) -> list[float]:
    return [float(f"{number:.7g}") for number in numbers.tolist()]
