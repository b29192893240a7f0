"""Limits how many rows a device processes at once, and which rows are processed together."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

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
        size: Rows at once, at least 1, or `auto`: all, halved whenever memory runs out; the smaller size is kept.
            Without effect in the reproducible mode.
        reproducible: Whether to use the reproducible mode; `auto` is resolved by `resolve`, and means no until then.

    Attributes:
        most: In the reproducible mode, rows of an image at once; halved when memory runs out. None in the other mode.
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
            torch.OutOfMemoryError: If a single row, a chunk of fixed size, or a whole image does not fit. In the
                reproducible mode also when `most` is halved: then the batch must be drawn again, see `redrawn`.
        """
        count = len(arguments[0])
        if getattr(_state, "inside", False):
            return function(*arguments)
        if self.most is None and not whole:
            return self._in_chunks(function, count, arguments)
        per_image = count // images
        parts = 1 if self.most is None or whole else -(-per_image // self.most)
        ends = [g * per_image + per_image * (k + 1) // parts for g in range(images) for k in range(parts)]
        slices = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if self.most is None:
            return _join([function(*(argument[part] for argument in arguments)) for part in slices])
        try:
            with _deterministic() as threads:
                compute = partial(
                    _compute, function, arguments, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                )
                several = parallel and self.concurrent and threads > 1 and len(slices) > 1
                if several and _on_cpu(arguments) and not torch.is_autocast_enabled("cpu"):
                    return _join(list(_workers(threads, os.getpid()).map(compute, slices)))
                return _join([compute(part) for part in slices])
        except torch.OutOfMemoryError as error:
            largest = max(part.stop - part.start for part in slices)
            if largest == 1 or whole:
                raise
            self.most = largest // 2
            _free()
            what = f"out of memory with {largest} rows of an image at once: now {self.most}, which may change last bits"
            warnings.warn(what, stacklevel=2)
            raise torch.OutOfMemoryError(f"{what}; draw the batch again") from error

    def _in_chunks(self, function: Callable[..., Rows], count: int, arguments: Sequence[Sequence | Tensor]) -> Rows:
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
                _free()
                warnings.warn(f"out of memory with {size} rows at once: chunk_size is now {self.limit}", stacklevel=3)
        return _join(done)


def redrawn(method: Callable[..., Any]) -> Callable[..., Any]:
    """Repeats a method of an object with a `diffusion` after a part of an image has run out of memory.

    All rows of the batch are then computed in the same smaller parts.
    """

    @wraps(method)
    def repeated(self: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            most = self.diffusion.chunker.most
            try:
                return method(self, *args, **kwargs)
            except torch.OutOfMemoryError:
                if self.diffusion.chunker.most == most:
                    raise

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


@contextmanager
def _deterministic() -> Iterator[int]:
    """Uses one thread per operation and cuDNN's deterministic algorithms; yields the threads there were before."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    try:
        if threads > 1:
            torch.set_num_threads(1)
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32):
            yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Returns threads that last; a forked process needs its own."""
    return ThreadPoolExecutor(threads, "svdd", initializer=partial(torch.set_num_threads, 1))


def _on_cpu(arguments: Sequence[Any]) -> bool:
    return all(argument.device.type == "cpu" for argument in arguments if isinstance(argument, Tensor))


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return _cat(parts)
    if isinstance(first, dict):
        return {name: _cat([part[name] for part in parts]) for name in first}
    return type(first)._make(_cat(fields) for fields in zip(*parts, strict=True))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Joins rows; tokens, of which a part has as many as its longest text, are padded with zeros at the end."""
    if parts[0].ndim == 3 and len(lengths := {part.shape[1] for part in parts}) > 1:
        parts = [torch.nn.functional.pad(part, (0, 0, 0, max(lengths) - part.shape[1])) for part in parts]
    return torch.cat(list(parts))
