"""Jobs of a benchmark, spread over processes that share the cores or the GPU of a machine."""

import argparse
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

__all__ = ["add_arguments", "spread"]

Job = TypeVar("Job")
Result = TypeVar("Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `spread` reads."""
    parser.add_argument("--device", default="cpu", help="cpu (one thread per process) or cuda")
    parser.add_argument("--processes", type=int, default=1)


def spread(
    measure: Callable[[Job, str], Result], jobs: Sequence[Job], options: argparse.Namespace
) -> Iterator[tuple[Job, Result]]:
    """Yields each job with `measure(job, device)` as it ends; a job that fails is printed and omitted.

    `measure` is a function of a module, and may cache what several jobs need.
    """
    one = partial(_one, measure, options.device)
    if options.processes == 1:
        _start()
        found = map(one, jobs)
        yield from (entry for entry in found if entry is not None)
        return
    with torch.multiprocessing.get_context("spawn").Pool(options.processes, _start) as pool:
        yield from (entry for entry in pool.imap_unordered(one, jobs) if entry is not None)


def _start() -> None:
    torch.set_num_threads(1)  # so that CPU seconds are comparable
    torch.backends.cudnn.allow_tf32 = False


def _one(measure: Callable[[Job, str], Result], device: str, job: Job) -> tuple[Job, Result] | None:
    try:
        return job, measure(job, device)
    except Exception:  # the others go on
        print(f"{job} failed:\n{traceback.format_exc()}", flush=True)
        return None
