"""Limits how many rows a device processes at once, and which rows are processed together."""

import gc
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from svdd import is_out_of_memory
from svdd.diffusion.row_limits import Call, RowLimits, Work, does_not_fit
from svdd.diffusion.row_parts import deterministic, join, together, workers

__all__ = ["Chunker", "Reproducible", "redrawn"]

Reproducible = bool | Literal["auto"]
Rows = TypeVar("Rows", bound=Tensor | tuple[Tensor, ...] | dict[str, Tensor])
_MOST = 20  # rows of an image at once: the usual M; in float32 larger calls are not faster on a CPU
_state = threading.local()  # `inside`: this thread computes a part, whose rows stay together


class Chunker:
    """Applies a row-wise function to chunks of rows and joins the results.

    The kernels that PyTorch picks, and so the last bits of a row, depend on the number of rows and of threads. In the
    reproducible mode they do not depend on other images: a call holds rows of one image only, equal parts of at most
    `most` rows, fewer where rows are large (see `Call.most`), and one thread computes it. Several threads compute
    several parts, as many at the same time as fit into the free memory.

    Args:
        size: Rows at once, at least 1, or `auto`: as many of each function as fit into the free memory, see
            `RowLimits`. Without effect in the reproducible mode.
        reproducible: Whether to use the reproducible mode; `auto` is resolved by `resolve`, and means no until then.

    Attributes:
        limit: Rows at once of all functions; None for `auto`.
        most: In the reproducible mode, rows of an image at once, of all functions; lowered when they do not fit. None
            in the other mode.
        concurrent: Whether the functions mapped with `parallel` may run in several threads.
        ledger: Of the batch; a call whose result is dropped leaves it as it was.
        measures: Whether a row is computed of which only the memory counts.
    """

    def __init__(self, size: int | str = "auto", reproducible: Reproducible = False) -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, got {size!r}")
        if not isinstance(reproducible, bool) and reproducible != "auto":
            raise ValueError(f"reproducible must be true, false or 'auto', got {reproducible!r}")
        self.limit = None if isinstance(size, str) else size
        self.reproducible, self.concurrent, self.measures = reproducible, False, False
        self.most: int | None = _MOST if reproducible is True else None
        self.limits = RowLimits()
        self.ledger: Any = None

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
        if getattr(_state, "inside", False):
            return function(*arguments)
        call = Call(function, arguments, work)
        if whole:
            return self._image_by_image(call, images)
        return self._in_chunks(call) if self.most is None else self._in_parts(call, images, parallel)

    def _in_chunks(self, call: Call) -> Any:
        """Computes as many rows at once as the chunk size says, or as fit."""
        done: list[Any] = []
        start, size = 0, min(self.limit or call.rows, call.rows)
        if self.limit is None:
            size = self._fitting(call, size, call.compute)
        while start < call.rows:
            left, before = call.rows - start, self._entered()
            part = -(-left // -(-left // size)) if self.limit is None else min(size, left)  # equal parts
            try:
                done.append(call.compute(slice(start, start + part)))
                start += part
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if part == 1 or self.limit is not None:
                    raise does_not_fit(call, part, error, fixed=part > 1) from error
            self._drop(before)  # after the handler, as the error's traceback holds tensors
            size = self.limits.lower(call, part)
            warnings.warn(
                f"out of memory with {part} rows at once: chunk_size is now {size} for the {call.name}", stacklevel=3
            )
        return join(done)

    def _image_by_image(self, call: Call, images: int) -> Any:
        """Computes all rows of an image at once."""
        compute = call.compute if self.most is None else _as_caller(call)
        with nullcontext() if self.most is None else deterministic():
            try:
                return join([compute(part) for part in _parts(call.rows, images, call.rows)])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise does_not_fit(call, call.rows // images, error) from error

    def _in_parts(self, call: Call, images: int, parallel: bool) -> Any:
        """Computes equal parts of an image's rows, in as many threads as fit; lowers `most` if no part does."""
        assert self.most is not None
        slices = _parts(call.rows, images, min(self.most, call.most))
        largest, why = max(part.stop - part.start for part in slices), ""
        with deterministic() as threads:
            compute = _as_caller(call)
            parallel = parallel and self.concurrent and call.on_cpu and not torch.is_autocast_enabled("cpu")
            several = min(threads if parallel else 1, len(slices))
            fitting = self._fitting(call, largest * several, compute, least=largest)
            if fitting < largest:
                why = f"{largest} rows of an image at once do not fit in the {call.name}"
            while not why:
                several, before = fitting // largest, self._entered()
                try:
                    if several > 1:
                        return join(together(workers(threads, os.getpid()), compute, slices, several))
                    return join([compute(part) for part in slices])
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if several == largest == 1:
                        raise does_not_fit(call, 1, error) from error
                self._drop(before)  # after the handler, as the error's traceback holds tensors
                fitting = self.limits.lower(call, several * largest)
                if several > 1:
                    fitting = max(fitting, largest)
                else:
                    why = f"out of memory with {largest} rows of an image at once in the {call.name}"
        self.most = max(1, fitting)
        what = f"{why}: now {self.most}, which may change last bits"
        warnings.warn(what, stacklevel=3)
        raise _Lowered(f"{what}; draw the batch again")

    def _fitting(self, call: Call, wanted: int, compute: Callable[[slice], Any], least: int = 1) -> int:
        """Returns how many of the `wanted` rows to compute at once; measures a row if it must."""

        def one() -> Any:
            before, measured, self.measures = self._entered(), self.measures, True
            try:
                return compute(slice(0, 1))
            finally:
                self.measures = measured
                self._drop(before)

        try:
            return self.limits.rows(call, wanted, one, least)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise does_not_fit(call, 1, error) from error

    def _entered(self) -> Any:
        return None if self.ledger is None else self.ledger.entered()

    def _drop(self, before: Any) -> None:
        """Drops what was entered into the ledger since then."""
        if before is not None:
            self.ledger.restore(before)


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


def _parts(rows: int, images: int, most: int) -> list[slice]:
    """Divides the rows of each image into equal parts of at most so many."""
    per_image = rows // images
    parts = -(-per_image // most)
    ends = [g * per_image + per_image * (k + 1) // parts for g in range(images) for k in range(parts)]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _as_caller(call: Call) -> Callable[[slice], Any]:
    """Returns a function that computes a part in any thread, with the present gradient mode."""
    gradient, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def compute(part: slice) -> Any:
        _state.inside = True
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
                return call.compute(part)
        finally:
            _state.inside = False

    return compute
