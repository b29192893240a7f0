"""Checks which rows of a batch a sampler keeps."""

from torch import Tensor

from svdd.state.finite import Finiteness

__all__ = ["within"]


def within(index: Tensor, rows: Tensor, finiteness: Finiteness) -> tuple[Tensor, int]:
    """Returns an index of `State.select`, int64 [groups, k], on the device of the rows, and how many a group has.

    Raises ValueError if it does not fit the rows, [n, ...]; an entry outside its group may be found by `settle` only.
    """
    groups, n = len(index), len(rows)
    if index.ndim != 2 or not groups or n % groups:
        raise ValueError(f"index must be [groups, k] with groups that divide {n} rows evenly, got {[*index.shape]}")
    index, size = index.to(rows.device), n // groups

    def refuse() -> None:
        raise ValueError(f"index must stay within its group of {size} rows, got {index.min()} .. {index.max()}")

    finiteness.check(((index < 0) | (index >= size)).flatten(), refuse)
    return index.clamp(0, size - 1), size  # an asynchronous device would fail before `settle`
