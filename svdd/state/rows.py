"""Rows of tensors, and of named tuples of tensors."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["interleave", "take"]


def take(known: Any, index: Tensor) -> Any:
    """Returns the rows that `index`, int64 [k], names."""
    return known[index] if isinstance(known, Tensor) else type(known)._make(part[index] for part in known)


def interleave(first: Any, second: Any, groups: int) -> Any:
    """Joins the rows group by group: each group's rows of `first`, then its rows of `second`."""
    if not isinstance(first, Tensor):
        return type(first)._make(interleave(*pair, groups) for pair in zip(first, second, strict=True))
    return torch.cat([part.unflatten(0, (groups, -1)) for part in (first, second)], 1).flatten(0, 1)
