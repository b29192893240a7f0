"""A rehearsal of a batch: the sampler runs from start to end, but each kind of work is computed a few times only.

Everything that takes time goes through `Chunker.map`. A rehearsal computes the first call of a kind, with its rows, and
answers the later ones with the same result. Its time is what the batch would take.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdd.diffusion.chunking import Chunker, Rows, Work
from svdd.guided_diffusion import GuidedDiffusion

__all__ = ["Rehearsal", "rehearsed"]

_LEAST, _MOST = 0.3, 20.0  # seconds: measure a kind of work for the first, and repeat no call that takes the second
_ALIKE = 1.25  # numbers of rows with at most this ratio take the same time per row

Kind = tuple[Work, tuple[Any, ...]]


class _Call(NamedTuple):
    """One measured call."""

    rows: int
    seconds: float
    result: Any
    entered: dict[str, float]  # in the ledger, from within the call


class Rehearsal(Chunker):
    """Takes the place of the chunker of a module's diffusion model, whose limits it uses; see `rehearsed`.

    Attributes:
        seconds: What all calls would have taken, by the part of the model.
        overhead: What they have taken beyond that, or below it, in seconds.
    """

    rehearses = True  # a reward in threads must have ended within a call

    def __init__(self, model: GuidedDiffusion, clock: Callable[[], float]) -> None:
        self.__dict__.update(vars(model.diffusion.chunker))
        self._model, self._clock, self._inside = model, clock, False
        self._known: dict[Kind, list[_Call]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.overhead = 0.0

    def map(
        self,
        function: Callable[..., Rows],
        images: int,
        *arguments: Sequence | Tensor,
        parallel: bool = False,
        work: Work = (),
        whole: bool = False,
    ) -> Rows:
        """Returns what `Chunker.map` does, or what an earlier call of the same kind returned."""

        def compute() -> Rows:
            return super(Rehearsal, self).map(function, images, *arguments, parallel=parallel, work=work, whole=whole)

        if self._inside:
            return compute()
        begin = self._clock()
        kind, rows = (work or (function.__qualname__,), _shapes(arguments)), len(arguments[0])
        known = self._known[kind]
        alike = [call for call in known if rows <= _ALIKE * call.rows and call.rows <= _ALIKE * rows]
        if not alike:
            self._inside = True
            try:
                alike = [self._measure(compute, rows, _device(arguments))]
            finally:
                self._inside = False
            known += alike
        call = min(alike, key=lambda each: abs(each.rows - rows))
        result, charge = _copied(call.result, rows), call.seconds * rows / call.rows
        for name, number in call.entered.items():
            self._enter(name, number * rows / call.rows)
        self.seconds[str(kind[0][0])] += charge
        self.overhead += self._clock() - begin - charge
        return result

    def _measure(self, compute: Callable[[], Any], rows: int, device: torch.device) -> _Call:
        """Computes once to warm up, then until the time is known; the ledger stays as it was.

        Of a compiled model, the call before that compiles, which takes minutes and is no part of a long run's time.
        """
        before = self._ledger()
        if getattr(self._model.diffusion, "compiled", False):
            compute()
        warmed = self._ledger()
        first, result = self._timed(compute, device)
        entered = {name: number - warmed[name] for name, number in self._ledger().items() if number != warmed[name]}
        times = [first] if first > _MOST else []
        while sum(times) < _LEAST and len(times) < 20:
            times.append(self._timed(compute, device)[0])
        for name in entered:
            self._enter(name, before[name] - self._ledger()[name])
        return _Call(rows, sum(times) / len(times), result, entered)

    def _ledger(self) -> dict[str, float]:
        return {} if self._model.ledger is None else asdict(self._model.ledger)

    def _enter(self, name: str, number: float) -> None:
        whole = type(getattr(self._model.ledger, name))  # counts stay integers
        setattr(self._model.ledger, name, whole(round(getattr(self._model.ledger, name) + number, 9)))

    def _timed(self, compute: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
        _wait(device)
        begin = self._clock()
        result = compute()
        _wait(device)
        return self._clock() - begin, result


@contextmanager
def rehearsed(model: GuidedDiffusion, clock: Callable[[], float] = time.perf_counter) -> Iterator[Rehearsal]:
    """Rehearses what the module draws within the block; limits that a lack of memory has lowered stay."""
    chunker = model.diffusion.chunker
    model.diffusion.chunker = rehearsal = Rehearsal(model, clock)
    try:
        yield rehearsal
    finally:
        model.diffusion.chunker = chunker
        chunker.limit, chunker.most = rehearsal.limit, rehearsal.most


def _shapes(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the shape and type of a row of each argument."""
    return tuple((*part.shape[1:], part.dtype) if isinstance(part, Tensor) else type(part) for part in arguments)


def _device(arguments: Sequence[Any]) -> torch.device:
    return next((part.device for part in arguments if isinstance(part, Tensor)), torch.device("cpu"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copied(result: Any, rows: int) -> Any:
    """Returns a result with this number of rows, repeated or cut."""
    if isinstance(result, Tensor):
        return result if len(result) == rows else result[torch.arange(rows, device=result.device) % len(result)]
    if isinstance(result, dict):
        return {name: _copied(part, rows) for name, part in result.items()}
    return type(result)._make(_copied(part, rows) for part in result)
