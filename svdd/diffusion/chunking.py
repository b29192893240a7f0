"""Limits how many rows a device processes at once."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Chunker"]

Rows = TypeVar("Rows", bound=Tensor | tuple[Tensor, ...] | dict[str, Tensor])


class Chunker:
    """Applies a row-wise function to chunks of rows and joins the results.

    Args:
        size: Rows at once, or `auto`: all, halved whenever memory runs out; the smaller size is kept.

    Raises:
        ValueError: If `size` is neither `auto` nor an integer >= 1.
    """

    def __init__(self, size: int | str = "auto") -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, got {size!r}")
        self.automatic = size == "auto"
        self.limit: int | None = None if isinstance(size, str) else size

    def map(self, function: Callable[..., Rows], count: int, *arguments: Sequence | Tensor) -> Rows:
        """Returns `function(*arguments)`, computed on slices of at most the current limit.

        Args:
            function: Takes slices of the arguments; returns a tensor, or a named tuple or dictionary of tensors, with
                one row per row of the slice.
            count: Number of rows, at least 1.
            arguments: Tensors or sequences of `count` rows.

        Raises:
            torch.OutOfMemoryError: If a single row, or a chunk of fixed size, does not fit.
        """
        done: list[Rows] = []
        start = 0
        while start < count:
            size = min(self.limit or count, count - start)
            try:
                part = function(*(argument[start : start + size] for argument in arguments))
            except torch.OutOfMemoryError:
                if not self.automatic or size == 1:
                    raise
                self._halve(size)
                continue
            done.append(part)
            start += size
        return done[0] if len(done) == 1 else _join(done)

    def _halve(self, size: int) -> None:
        self.limit = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {size} rows at once: chunk_size is now {self.limit}", stacklevel=3)


def _join(parts: list[Any]) -> Any:
    """Joins tensors along the first dimension, or named tuples and dictionaries of tensors field by field."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], dict):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return type(parts[0])._make(torch.cat(fields) for fields in zip(*parts, strict=True))
