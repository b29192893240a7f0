"""How many rows of each function fit into the memory of a device at once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svdd import UserError, first_line, say
from svdd.diffusion.memory import PeakMemory, free_memory, in_units, release_memory

__all__ = ["OutOfMemory", "RowLimits", "device_of", "does_not_fit", "kind_of", "may_be_short", "name_of"]

# A function is measured if this bound on its needs is above half of the free memory. A latent row of Stable Diffusion
# 1.5 at 512 pixels has 64 kB, for which the network takes 0.3 GB and the float32 decoder 2.5 GB.
_PER_BYTE, _GRADIENT, _SCORER = 50_000, 5, 256_000_000
_SCORERS = ("reward", "text encoder", "function")
_SHARE = 0.8  # of the free memory that may be planned
_LARGER = 1.5  # times the rows at once so far: look at the free memory again
_EVERY = 8  # calls in chunks from one look for more room to the next

Work = tuple[Any, ...]


class OutOfMemory(UserError, torch.OutOfMemoryError):
    """The smallest call does not fit into the memory of the device."""


@dataclass
class _Known:
    """What is known of a function."""

    rows: int | None = None  # at once; None: all
    need: float | None = None  # bytes that a row takes; None: not measured
    result: float = 0.0  # bytes of the result's row
    looked: float = 0  # rows at once for which there was memory
    calls: int = 0  # in chunks, since the last look


@dataclass
class RowLimits:
    """The largest number of rows that each function may compute at once; without a limit, all.

    A function's first call takes all rows if a bound, from the size of its input, says that memory cannot be short.
    Otherwise one row is computed, its result is dropped, and the memory that it took gives the number that fits. That
    number is halved when memory runs out, and doubled when there is room for twice as many.
    """

    _known: dict[Hashable, _Known] = field(default_factory=dict)

    def rows(
        self, kind: Hashable, work: Work, wanted: int, arguments: Sequence[Any], one: Callable[[], Any], share: int = 1
    ) -> int:
        """Returns how many of the `wanted` rows to compute at once, where `share` threads do so.

        Args:
            kind: The function and the shapes of its arguments: see `kind_of`.
            work: As in `Chunker.map`.
            wanted: Rows, at least 1.
            arguments: As in `Chunker.map`.
            one: Computes one row.
            share: Calls at the same time.
        """
        known = self._known.setdefault(kind, _Known())
        known.calls += known.rows is not None and wanted > known.rows
        limit = min(wanted, known.rows or wanted)
        look = known.calls >= _EVERY or limit * share > _LARGER * known.looked
        device = device_of(arguments)
        part: Any = work[1] if len(work) > 1 else None
        if not look or getattr(part, "threads", 0) > 0:  # no tensors on the device
            return limit
        known.calls = 0
        if (free := free_memory(device)) is None:
            return limit
        if known.need is None:
            if not may_be_short(work, arguments, limit * share, free):
                known.looked = limit * share
                return limit
            if not _measure(known, one, device):
                return limit
            free = free_memory(device) or free
        fits = max(1, int((_SHARE * free - wanted * share * known.result) / (known.need or 1) / share))
        known.looked = min(limit, fits) * share
        if fits < limit or (known.rows is not None and fits >= 2 * known.rows):
            known.rows = 1 << (min(fits, 2 * known.rows if known.rows else fits).bit_length() - 1)
            count = f"{min(wanted, known.rows)} of {wanted} rows"
            each = f"{in_units(known.need or 0)} a row, {in_units(free)} free on {device}"
            say(f"svdd: the {name_of(work)} computes {count} at once ({each})", error=True)
        return min(wanted, known.rows or wanted)

    def lower(self, kind: Hashable, failed: int, device: torch.device) -> int:
        """Returns half of the rows for which memory ran out, from now on the limit; frees what is not used."""
        known = self._known.setdefault(kind, _Known())
        release_memory(device)
        if (free := free_memory(device)) is not None:
            known.need = max(known.need or 0.0, free / failed)
        known.rows, known.calls = failed // 2, 0
        return known.rows


def may_be_short(work: Work, arguments: Sequence[Any], rows: int, free: int) -> bool:
    """Whether so many rows at once might take more than half of the free memory, by the size of their input."""
    row = max((part[:1].nbytes for part in arguments if isinstance(part, Tensor)), default=0)
    name = name_of(work)
    bound = _SCORER + 20 * row if name in _SCORERS else _PER_BYTE * row * (_GRADIENT if name == "gradient" else 1)
    return rows * bound > free / 2


def kind_of(function: Callable[..., Any], work: Work, arguments: Sequence[Any]) -> Hashable:
    """Returns what decides the memory of a row: the function, and the shape and type of a row of each argument."""
    shapes = ((*part.shape[1:], part.dtype) if isinstance(part, Tensor) else type(part) for part in arguments)
    return work or (getattr(function, "__qualname__", type(function).__qualname__),), tuple(shapes)


def device_of(arguments: Sequence[Any]) -> torch.device:
    """Returns the device of the first tensor; the CPU if there is none."""
    return next((part.device for part in arguments if isinstance(part, Tensor)), torch.device("cpu"))


def name_of(work: Work) -> str:
    """Returns the function's name for a message."""
    return str(work[0]) if work else "function"


def does_not_fit(work: Work, rows: int, arguments: Sequence[Any], error: BaseException, fixed: bool) -> OutOfMemory:
    """Returns an error in one line: which function, how many rows, what is free, and what to do."""
    device, name = device_of(arguments), name_of(work)
    free = free_memory(device)
    known = "" if free is None else f", {in_units(free)} are free"
    count = "a row does" if rows == 1 else f"{rows} rows at once do"
    less = {"reward": "take a smaller reward or smaller pictures", "decoder": "set vae_slicing or vae_tiling"}
    help = f"{less.get(name, 'take smaller pictures')}, dtype bfloat16 or offload model (model.diffusion.…)"
    help = "lower model.diffusion.chunk_size, or set it to auto" if fixed else help
    return OutOfMemory(f"out of memory: {count} not fit in the {name} on {device}{known} ({first_line(error)}); {help}")


def _measure(known: _Known, one: Callable[[], Any], device: torch.device) -> bool:
    """Measures the memory of one row; returns whether the device could."""
    release_memory(device)  # a heap with room would hide what a row takes
    memory = PeakMemory(device)
    if not memory.resets:
        return False
    found = [leaf for leaf in tree_leaves(one()) if isinstance(leaf, Tensor)]
    peak = memory.peak()
    if peak is None or memory.before is None:
        return False
    known.result = float(sum(leaf.nbytes for leaf in found))
    known.need = float(max(peak - memory.before, known.result, 1))
    del found
    release_memory(device)
    return True
