"""Devices by name, and environment variables that give each of several processes a device of its own."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from svdd import UserError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["environments", "gpus", "named_device", "one_device"]


def named_device(name: str) -> "torch.device":
    """Returns a device by its name, `auto` for the best one; raises UserError if it cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used: {first_line(error)}") from error


def gpus() -> list[str]:
    """Returns the names of the visible GPUs, as in `CUDA_VISIBLE_DEVICES`."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    found = torch.cuda.device_count()
    return visible[:found] if visible else [str(number) for number in range(found)]


def one_device(found: Sequence[str]) -> dict[str, str]:
    """Returns the variables of a single process, which uses the first GPU if there is one."""
    return {"CUDA_VISIBLE_DEVICES": found[0]} if found else {}


def environments(count: int, found: Sequence[str]) -> list[dict[str, str]]:
    """Returns the variables of each of `count` processes: its GPU, or without any its share of the CPU's threads.

    Raises:
        UserError: If there are fewer GPUs.
    """
    if not found:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))}] * count
    if count > len(found):
        raise UserError(f"--devices {count}: this machine has {len(found)}; for its CPU set --trainer.accelerator cpu")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found[:count]]
