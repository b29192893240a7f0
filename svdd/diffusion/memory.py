"""The memory of a device: what is free, and the most that is taken."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import torch

__all__ = ["PeakMemory", "free_memory", "in_units", "release_memory"]

_UNLIMITED = 1 << 60  # a version 1 control group without a limit states a number above this


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process can still take on a device; None if they are unknown.

    On a CPU these are its share of what is available on the machine, limited by the control groups of the process
    (versions 1 and 2, those above included) and by its own limits (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cpu":
        return _free_on_cpu()
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    module = _module(device)
    if module is None or not hasattr(module, "mem_get_info"):
        return None
    held = module.memory_reserved(device) - module.memory_allocated(device)  # by the allocator, unused
    return int(module.mem_get_info(device)[0] + held)


def release_memory(device: torch.device | None) -> None:
    """Returns unused memory to the device: of dropped objects, of the allocator's cache, of the C library's heap.

    None stands for the CPU and the machine's accelerator.
    """
    gc.collect()
    if device is None:
        release_memory(torch.device("cpu"))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return
    if device.type == "cpu":
        if (trim := _trim()) is not None:
            trim(0)
    elif (module := _module(device)) is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


class PeakMemory:
    """The most memory that is taken on a device from now on, in bytes.

    That is what is allocated on a GPU, and the resident size of this process on a CPU. On MPS it is what the driver has
    given, which includes what the allocator keeps for later.

    Attributes:
        before: What is taken now; None if that is unknown.
    """

    _all: ClassVar["WeakSet[PeakMemory]"] = WeakSet()

    def __init__(self, device: torch.device) -> None:
        self._device, self._most = device, 0
        for other in self._all:  # the system keeps one maximum, which is reset here
            if other._device.type == device.type:
                other.peak()
        self.resets = _reset(device)
        self.before = _most(device)
        self._all.add(self)

    def peak(self) -> int | None:
        """Returns the most that was taken since this object was made."""
        found = _most(self._device)
        self._most = max(self._most, found or 0)
        return None if found is None else self._most


def in_units(number: float) -> str:
    """Returns a number of bytes with a unit."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _module(device: torch.device) -> Any:
    """Returns the module of PyTorch for a kind of device, such as torch.cuda; None if there is none."""
    with suppress(RuntimeError, AssertionError):
        return torch.get_device_module(device)
    return None


def _reset(device: torch.device) -> bool:
    """Makes what is taken now the maximum; returns whether the device can."""
    if device.type == "cpu":
        with suppress(OSError):  # Linux
            Path("/proc/self/clear_refs").write_text("5")
            return True
        return False
    if device.type != "mps" and hasattr(module := _module(device), "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)
        return True
    return device.type == "mps"  # its allocator keeps what it has taken


def _most(device: torch.device) -> int | None:
    """Returns the maximum since the last reset, in bytes."""
    if device.type == "cpu":
        return _most_resident()
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if hasattr(module := _module(device), "max_memory_allocated"):
        return int(module.max_memory_allocated(device))
    return None


def _most_resident() -> int | None:
    """Returns the largest resident size of this process, in bytes."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    import psutil  # Windows

    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0)) or None


def _free_on_cpu() -> int:
    import psutil

    available = min(psutil.virtual_memory().available, *_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    return max(0, min(available // _processes(), *_own_rooms(psutil.Process())))


def _processes() -> int:
    """Returns the number of this run's processes on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        with suppress(KeyError, ValueError):
            return max(1, int(os.environ[name]))
    return 1


def _rooms(groups: Path, mount: Path) -> Iterator[int]:
    """Yields what the control groups of a process, and those that hold them, leave to it, in bytes."""
    yield _UNLIMITED
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if "memory" in kinds.split(","):
                root, files = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
                cached = "total_inactive_file"
            elif not kinds:
                root = mount / "unified" if (mount / "unified").is_dir() else mount
                files, cached = ("memory.max", "memory.current"), "inactive_file"
            else:
                continue
            own = root / path.lstrip("/")  # in a container it may be the mount itself
            for folder in [own, *own.parents][: len(own.relative_to(root).parts) + 1]:
                with suppress(OSError, ValueError):  # no such group, or `max`
                    limit, used = (int((folder / name).read_text()) for name in files)
                    numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    if limit < _UNLIMITED:
                        yield limit - used + int(numbers.get(cached, 0))  # the page cache makes room


def _own_rooms(process: Any) -> Iterator[int]:
    """Yields what the limits of a process leave to it, in bytes."""
    yield _UNLIMITED
    with suppress(ImportError, AttributeError):  # Windows has none, and macOS other numbers
        import resource

        taken = process.memory_info()
        for kind, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, taken.data)):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - used


@cache
def _trim() -> Any:
    """Returns the GNU C library's `malloc_trim`; None elsewhere."""
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(None).malloc_trim if sys.platform.startswith("linux") else None
    return None
