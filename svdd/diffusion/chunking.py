"""Limits how many rows a device processes at once, and which rows are processed together."""

import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from svdd import first_line, is_out_of_memory
from svdd.diffusion.memory import free_memory, release_memory
from svdd.diffusion.row_limits import RowLimits, device_of, does_not_fit, kind_of, may_be_short, name_of
from svdd.diffusion.row_parts import deterministic, join, together, workers

__all__ = ["Chunker", "Reproducible", "redrawn"]

Reproducible = bool | Literal["auto"]
Work = tuple[Any, ...]  # hashable: the part of the model, then all else that decides the cost of a row
Rows = TypeVar("Rows", bound=Tensor | tuple[Tensor, ...] | dict[str, Tensor])
_MOST = 20  # rows of an image at once: the usual M; in float32 larger calls are not faster on a CPU
_state = threading.local()  # `inside`: this thread computes a part, whose rows stay together


class Chunker:
    """Applies a row-wise function to chunks of rows and joins the results.

    The kernels that PyTorch picks, and so the last bits of a row, depend on the number of rows and of threads. In the
    reproducible mode they do not depend on other images: a call holds rows of one image only, equal parts of at most
    `most` rows, and one thread computes it. Several threads compute several parts.

    Args:
        size: Rows at once, at least 1, or `auto`: as many of each function as fit into the free memory, see
            `RowLimits`. Without effect in the reproducible mode.
        reproducible: Whether to use the reproducible mode; `auto` is resolved by `resolve`, and means no until then.

    Attributes:
        limit: Rows at once of all functions; None without such a limit.
        most: In the reproducible mode, rows of an image at once, of all functions; lowered when they do not fit. None
            in the other mode.
        agree: Called with a new `most`; returns that of all processes of the run, which it records.
        chosen: Whether `most` is final, unless memory runs out.
        ledger: Of the batch; a call whose result is dropped leaves it as it was.
        concurrent: Whether the functions mapped with `parallel` may run in several threads.
    """

    def __init__(self, size: int | str = "auto", reproducible: Reproducible = False) -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, got {size!r}")
        if not isinstance(reproducible, bool) and reproducible != "auto":
            raise ValueError(f"reproducible must be true, false or 'auto', got {reproducible!r}")
        self.limit = None if isinstance(size, str) else size
        self.automatic = size == "auto"
        self.reproducible, self.concurrent = reproducible, False
        self.most: int | None = _MOST if reproducible is True else None
        self.limits = RowLimits()
        self.agree: Callable[[int], int | None] | None = None
        self.ledger: Any = None
        self.chosen = self._choosing = False

    def resolve(self, automatic: bool) -> None:
        """Switches the reproducible mode on or off where the setting leaves it open."""
        if self.reproducible == "auto" and automatic != (self.most is not None):
            self.most = _MOST if automatic else None

    def map(
        self,
        function: Callable[..., Rows],
        images: int,
        *arguments: Sequence | Tensor,
        parallel: bool = False,
        work: Work = (),
        whole: bool = False,
    ) -> Rows:
        """Returns `function(*arguments)`, computed on slices of the rows.

        `work` names the kind of work, for estimates of time: calls of one kind and shape take equally long.

        Each argument has the same number of rows, at least 1: the rows of each of `images` images in turn. The function
        returns a tensor, or a named tuple or dictionary of tensors, with one row per row of the slice. With `whole`, a
        slice holds all rows of one image, whatever the chunk size.

        Raises:
            OutOfMemory: If a single row, a chunk of fixed size, or a whole image does not fit.
            torch.OutOfMemoryError: In the reproducible mode, if `most` is lowered: then the batch must be drawn again,
                see `redrawn`.
        """
        count = len(arguments[0])
        if getattr(_state, "inside", False):
            return function(*arguments)
        if self.most is None and not whole:
            return self._in_chunks(function, count, arguments, work)
        per_image = count // images
        parts = 1 if self.most is None or whole else -(-per_image // self.most)
        ends = [g * per_image + per_image * (k + 1) // parts for g in range(images) for k in range(parts)]
        slices = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        largest, failed = max(part.stop - part.start for part in slices), ""
        try:
            if self.most is None:
                return join([function(*(argument[part] for argument in arguments)) for part in slices])
            with deterministic() as threads:
                compute = partial(
                    _compute, function, arguments, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                )
                several = parallel and self.concurrent and threads > 1 and _on_cpu(arguments)
                several = several and not torch.is_autocast_enabled("cpu")
                if not whole:
                    self._fit(function, work, largest, arguments, compute, threads if several else 1, len(slices))
                if several and len(slices) > 1:
                    return join(together(workers(threads, os.getpid()), compute, slices))
                return join([compute(part) for part in slices])
        except Exception as error:
            if isinstance(error, _Lowered) or not is_out_of_memory(error):
                raise
            if largest == 1 or whole or self.most is None:
                raise does_not_fit(work, largest, arguments, error, False) from error
            failed = first_line(error)
        release_memory(device_of(arguments))
        return self._lower(largest // 2, f"out of memory with {largest} rows of an image at once", failed)

    @property
    def must_choose(self) -> bool:
        """Whether `most` is to be chosen before anything is drawn."""
        return self.most is not None and not self.chosen

    def may_be_short(self, row: Tensor) -> bool:
        """Whether `most` latents at once, of which `row` holds one, [1, ...], might not fit into the free memory."""
        free, threads = free_memory(row.device), torch.get_num_threads() if self.concurrent else 1
        return free is not None and may_be_short(("network",), (row,), threads * (self.most or 0), free)

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Lets calls with one row lower `most`, before anything is drawn, to what fits."""
        self._choosing = True
        try:
            yield
        finally:
            self._choosing = False

    def choose(self) -> None:
        """Agrees on `most` with the other processes of the run."""
        self._set_most(self.most)
        self.chosen = True

    def _fit(
        self,
        function: Callable[..., Any],
        work: Work,
        largest: int,
        arguments: Sequence[Any],
        compute: Callable[[slice], Any],
        threads: int,
        parts: int,
    ) -> None:
        """Lowers `most` if `largest` rows of a function, or `most` while it is chosen, do not fit at once."""
        assert self.most is not None
        wanted, share = (self.most, threads) if self._choosing else (largest, min(threads, parts))
        fits = self._rows(function, work, wanted, arguments, lambda: compute(slice(0, 1)), share)
        if fits < wanted and self._choosing:
            self.most = fits
        elif fits < wanted:
            self._lower(fits, f"{wanted} rows of an image at once do not fit in the {name_of(work)}", "")

    def _set_most(self, most: int | None) -> None:
        self.most = most if self.agree is None or most is None else self.agree(most)

    def _lower(self, most: int, why: str, error: str) -> Any:
        """Lowers `most` and ends the batch."""
        self._set_most(most)
        what = f"{why}: now {self.most}, which may change last bits"
        warnings.warn(what, stacklevel=3)
        raise _Lowered(f"{what}; draw the batch again{f' ({error})' if error else ''}")

    def _rows(
        self,
        function: Callable[..., Any],
        work: Work,
        wanted: int,
        arguments: Sequence[Any],
        one: Callable[[], Any],
        share: int = 1,
    ) -> int:
        before = self._entered()
        try:
            return self.limits.rows(kind_of(function, work, arguments), work, wanted, arguments, one, share)
        finally:
            self._drop(before)

    def _entered(self) -> Any:
        return None if self.ledger is None else self.ledger.entered()

    def _drop(self, before: Any) -> None:
        """Drops what was entered into the ledger since then."""
        if before is not None:
            self.ledger.restore(before)

    def _in_chunks(
        self, function: Callable[..., Rows], count: int, arguments: Sequence[Sequence | Tensor], work: Work
    ) -> Rows:
        def compute(part: slice) -> Rows:
            return function(*(argument[part] for argument in arguments))

        done: list[Rows] = []
        start, limit = 0, self.limit or count
        while start < count:
            failed, left = 0, count - start
            size, before = min(limit, left), self._entered()
            try:
                if self.automatic:
                    if not start:
                        size = limit = self._rows(function, work, size, arguments, lambda: compute(slice(0, 1)))
                    size = -(-left // -(-left // limit))  # equal parts
                done.append(compute(slice(start, start + size)))
                start += size
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self.automatic or size == 1:
                    raise does_not_fit(work, size, arguments, error, not self.automatic and size > 1) from error
                failed = size
            if failed:  # after the handler, as the error's traceback holds tensors
                self._drop(before)
                limit = self.limits.lower(kind_of(function, work, arguments), failed, device_of(arguments))
                what = f"out of memory with {failed} rows at once: chunk_size is now {limit} for the {name_of(work)}"
                warnings.warn(what, stacklevel=3)
        return join(done)


class _Lowered(torch.OutOfMemoryError):
    """The batch must be drawn again with a lower `Chunker.most`."""


def redrawn(method: Callable[..., Any]) -> Callable[..., Any]:
    """Repeats a method of an object with a `diffusion` after a part of an image has run out of memory.

    All rows of the batch are then computed in the same smaller parts.
    """

    @wraps(method)
    def repeated(self: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            with suppress(_Lowered):
                return method(self, *args, **kwargs)
            gc.collect()  # what the batch held

    return repeated


def _compute(
    function: Callable[..., Any], arguments: Sequence[Any], gradient: bool, inference: bool, part: slice
) -> Any:
    """Evaluates the function on a part, in any thread, with the caller's gradient mode."""
    _state.inside = True
    try:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
            return function(*(argument[part] for argument in arguments))
    finally:
        _state.inside = False


def _on_cpu(arguments: Sequence[Any]) -> bool:
    return all(argument.device.type == "cpu" for argument in arguments if isinstance(argument, Tensor))
