"""How many rows of each function fit into the memory of a device at once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svdd import UserError, first_line, say
from svdd.diffusion.memory import PeakMemory, free_memory, in_units, release_memory

__all__ = ["Call", "OutOfMemory", "RowLimits", "Work", "does_not_fit"]

Work = tuple[Any, ...]  # hashable: the part of the model, then all else that decides the cost of a row

# A function is measured if these bounds on its needs exceed half of the free memory. A latent row of Stable Diffusion
# 1.5 at 512 pixels has 64 kB, for which the network takes 0.3 GB and the float32 decoder 2.5 GB.
_PER_BYTE, _GRADIENT, _SCORER = 50_000, 5, 256_000_000
_SCORERS = ("reward", "text encoder", "function")
# Numbers of a latent row times rows in a part of the reproducible mode: 20 rows of the same model, and 2 to decode.
_NUMBERS, _NUMBERS_OF = 20 * 4 * 64 * 64, {"decoder": 2 * 4 * 64 * 64, "gradient": 4 * 4 * 64 * 64}
_SHARE = 0.8  # of the free memory that may be planned
_LARGER = 1.5  # times the rows at once so far: look at the free memory again
_EVERY = 8  # calls in chunks from one look for more room to the next


class OutOfMemory(UserError, torch.OutOfMemoryError):
    """The smallest call does not fit into the memory of the device."""


class Call:
    """A row-wise function and its arguments, each with the same number of rows.

    Attributes:
        name: Of the part of the model, for messages.
        kind: What decides the memory of a row: the function, whether it has a graph for gradients, and the shape and
            type of a row of each argument. It refers to no object.
        rows: Their number.
        device: Of the first tensor; None, which is unknown, if there is none.
    """

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], work: Work) -> None:
        self._function, self._arguments = function, arguments
        self._tensors = [each for each in arguments if isinstance(each, Tensor)]
        self._part: Any = work[1] if len(work) > 1 else None
        self.name = str(work[0]) if work else "function"
        shapes = ((*each.shape[1:], each.dtype) if isinstance(each, Tensor) else type(each) for each in arguments)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        work = work or (name, id(getattr(function, "__self__", None)))
        self.kind: Hashable = (*map(hash, work), torch.is_grad_enabled(), *shapes)
        self.rows = len(arguments[0])
        self.device = self._tensors[0].device if self._tensors else None

    def compute(self, part: slice) -> Any:
        """Evaluates the function on some rows."""
        return self._function(*(each[part] for each in self._arguments))

    @property
    def on_cpu(self) -> bool:
        """Whether all tensors are on the CPU."""
        return all(each.device.type == "cpu" for each in self._tensors)

    @property
    def beside(self) -> bool:
        """Whether the call hands its rows to threads beside the device."""
        return bool(getattr(self._part, "threads", 0))

    @cached_property
    def most(self) -> int:
        """The most rows in a part of the reproducible mode; it depends on the size of a row alone."""
        if self.name in _SCORERS:
            return self.rows
        numbers = max((each[:1].numel() for each in self._tensors), default=0)
        return max(1, _NUMBERS_OF.get(self.name, _NUMBERS) // max(1, numbers))

    def bound(self) -> int:
        """Returns the bytes that a row takes at most, by the size of its input."""
        row = max((each[:1].nbytes for each in self._tensors), default=0)
        if self.name in _SCORERS:
            return _SCORER + 20 * row
        return _PER_BYTE * row * (_GRADIENT if self.name == "gradient" else 1)


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

    def rows(self, call: Call, wanted: int, one: Callable[[], Any], least: int = 1) -> int:
        """Returns how many of the `wanted` rows to compute at once.

        That is less than `least` only if so many have not been computed yet and do not fit.

        Args:
            call: The call.
            wanted: Rows, at least 1.
            one: Computes one row.
            least: Rows of the smallest call.
        """
        known = self._known.setdefault(call.kind, _Known())
        known.calls += known.rows is not None and wanted > known.rows
        limit = min(wanted, max(known.rows or wanted, least))
        if call.beside or not (known.calls >= _EVERY or limit > _LARGER * known.looked):
            return limit
        known.calls = 0
        if call.device is None or (free := free_memory(call.device)) is None:
            return limit
        if known.need is None:
            if 2 * limit * call.bound() <= free or not _measure(known, one, call.device):
                known.looked = limit
                return limit
            free = free_memory(call.device) or free
        assert known.need is not None
        fits = max(1, int((_SHARE * free - wanted * known.result) / known.need))
        if least <= known.looked:  # it has been computed
            fits = max(fits, least)
        known.looked = min(limit, fits)
        if known.rows is None and fits < limit:
            known.rows = fits
            each = f"{in_units(known.need)} a row, {in_units(free)} free on {call.device}"
            say(f"svdd: the {call.name} computes {fits} of {wanted} rows at once ({each})", error=True)
        elif known.rows is not None and (fits < limit or fits >= 2 * known.rows):
            known.rows = min(fits, max(2 * known.rows, least))
        return min(wanted, max(known.rows or wanted, min(fits, least)))

    def lower(self, call: Call, failed: int) -> int:
        """Returns half of the rows for which memory ran out, from now on the limit; frees what is not used."""
        known = self._known.setdefault(call.kind, _Known())
        release_memory(call.device)
        if call.device is not None and (free := free_memory(call.device)) is not None:
            known.need = min(max(known.need or 0.0, free / failed), 2 * (known.need or free))
        known.rows, known.calls = max(1, failed // 2), 0
        return known.rows


def does_not_fit(call: Call, rows: int, error: BaseException, fixed: bool = False) -> OutOfMemory:
    """Returns an error in one line: which function, how many rows, what is free, and what to do."""
    free = None if call.device is None else free_memory(call.device)
    known = f" on {call.device}" * (call.device is not None)
    known += "" if free is None else f", {in_units(free)} are free"
    count = "a row does" if rows == 1 else f"{rows} rows at once do"
    less = {"reward": "take a smaller reward or smaller pictures", "decoder": "set vae_slicing or vae_tiling"}
    help = f"{less.get(call.name, 'take smaller pictures')}, dtype bfloat16 or offload model (model.diffusion.…)"
    help = "lower model.diffusion.chunk_size, or set it to auto" if fixed else help
    what = f"out of memory: {count} not fit in the {call.name}{known} ({first_line(error)})"
    return OutOfMemory(f"{what}; {help}")


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
