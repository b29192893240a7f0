"""How many candidates a particle has at every step."""

import math
from itertools import pairwise

from svdd import UserError, described, is_integer
from svdd.samplers.base import require_at_least_one
from svdd.samplers.toolbox.window import Window

__all__ = ["Counts", "Schedule", "expand", "scaled"]

Counts = int | list[int] | dict[float, int]


class Schedule:
    """M candidates at each step: what `counts` says in the guided steps of the window, 1 elsewhere.

    Args:
        counts: M of all steps; or {fraction of the chain where a stretch ends: its M}, in rising order up to 1; or a
            list with the M of each of the T steps.
        window: The guided steps.
    """

    def __init__(self, counts: Counts, window: Window) -> None:
        if not (is_integer(counts) or isinstance(counts, list | dict)):
            raise ValueError(
                "num_candidates must be an integer, a list with one integer per step, or a dict as in "
                f"{{0.3: 4, 1.0: 32}}, got {described(counts)}"
            )
        self._counts, self._window = counts, window
        fractions = _fractions(counts) if isinstance(counts, dict) else [1.0]
        if fractions[-1:] != [1] or not all(a < b for a, b in pairwise([0, *fractions])):
            raise ValueError(
                "num_candidates: the fractions where its stretches end must rise from above 0 to 1, as in "
                f"{{0.3: 4, 1.0: 32}}, got {[*fractions]}"
            )
        each = counts if isinstance(counts, list) else [*counts.values()] if isinstance(counts, dict) else [counts]
        if not each:
            raise ValueError("num_candidates must have one count per step, got an empty list")
        for count in each:
            require_at_least_one(num_candidates=count)
        self.first, self.most = each[0], max(each)

    def __call__(self, i: int, num_inference_steps: int) -> int:
        """Returns M of the step from i to i + 1 of a chain of that length."""
        counts = expand(self._counts, num_inference_steps)
        return counts[i] if self._window.guides(i, num_inference_steps) else 1

    def guides(self, i: int, num_inference_steps: int) -> bool:
        """Whether there is a choice at the step from i to i + 1."""
        return self(i, num_inference_steps) > 1


def expand(counts: Counts, num_inference_steps: int) -> list[int]:
    """Returns the count of each step; UserError if a list is for another number of steps."""
    if isinstance(counts, list):
        if len(counts) != num_inference_steps:
            raise UserError(
                f"num_candidates has {len(counts)} counts, one per step, and the chain has num_inference_steps="
                f"{num_inference_steps}; give as many, or fractions of the chain as in {{0.3: 4, 1.0: 32}}"
            )
        return counts
    if not isinstance(counts, dict):
        return [counts] * num_inference_steps
    ends = [math.ceil(round(fraction * num_inference_steps, 9)) for fraction in _fractions(counts)]
    stretches = list(zip(ends, counts.values(), strict=True))
    return [next(count for end, count in stretches if i < end) for i in range(num_inference_steps)]


def scaled(counts: Counts, total: int, num_inference_steps: int) -> list[int]:
    """Returns counts of the same proportions that sum to about `total`, each at least 1."""
    given = expand(counts, num_inference_steps)
    return [max(1, round(count * total / sum(given))) for count in given]


def _fractions(counts: dict[float, int]) -> list[float]:
    """Returns the keys, which a recorded configuration holds as text; ValueError if one is no number."""
    try:
        return [float(fraction) for fraction in counts]
    except (TypeError, ValueError):
        raise ValueError(f"num_candidates: expected fractions of the chain as keys, got {[*counts]}") from None
