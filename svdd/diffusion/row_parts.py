"""Computes parts of a call's rows in threads, deterministically, and joins the results."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["deterministic", "join", "together", "workers"]


@contextmanager
def deterministic() -> Iterator[int]:
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
def workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Returns threads that last; a forked process needs its own."""
    return ThreadPoolExecutor(threads, "svdd", initializer=partial(torch.set_num_threads, 1))


def together(
    workers: ThreadPoolExecutor, compute: Callable[[slice], Any], slices: Sequence[slice], several: int
) -> list[Any]:
    """Computes parts in so many threads at a time; after an error it waits for those that have begun."""
    gate = threading.Semaphore(several)

    def limited(part: slice) -> Any:
        with gate:
            return compute(part)

    waiting = [workers.submit(limited, part) for part in slices]
    if any(future.exception() for future in wait(waiting, return_when=FIRST_EXCEPTION).done):
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise next(error for future in waiting if not future.cancelled() and (error := future.exception()))
    return [future.result() for future in waiting]


def join(parts: list[Any]) -> Any:
    """Joins the results of parts: tensors, or the tensors of dictionaries or named tuples."""
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
