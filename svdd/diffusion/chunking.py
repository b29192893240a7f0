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
        size: Rows at once, at least 1, or `auto`: all, halved whenever memory runs out; the smaller size is kept.
    """

    def __init__(self, size: int | str = "auto") -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, got {size!r}")
        self.limit = None if isinstance(size, str) else size
        self.automatic = size == "auto"

    def map(self, function: Callable[..., Rows], count: int, *arguments: Sequence | Tensor) -> Rows:
        """Returns `function(*arguments)`, computed on slices of at most the current limit.

        Each argument has `count` >= 1 rows. The function returns a tensor, or a named tuple or dictionary of tensors,
        with one row per row of the slice. OutOfMemoryError if a single row, or a chunk of fixed size, does not fit.
        """
        done: list[Rows] = []
        start = 0
        while start < count:
            size = min(self.limit or count, count - start)
            try:
                done.append(function(*(argument[start : start + size] for argument in arguments)))
                start += size
            except torch.OutOfMemoryError:
                if not self.automatic or size == 1:
                    raise
                self.limit = size // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                warnings.warn(f"out of memory with {size} rows at once: chunk_size is now {self.limit}", stacklevel=2)
        return done[0] if len(done) == 1 else _join(done)


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {name: torch.cat([part[name] for part in parts]) for name in first}
    return type(first)._make(torch.cat(fields) for fields in zip(*parts, strict=True))
