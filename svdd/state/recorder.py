"""Follows the particles of a batch: which descends from which, their values, and their x0 at chosen steps."""

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from svdd.state.state import State

__all__ = ["Particles", "Recorder", "descent", "recorded"]

_OWN, _PARENT = "particle", "parent particle"  # in a state's cache: numbers of its rows, and of those they descend from


class Particles(NamedTuple):
    """Every particle that took a step, and the ends that a sampler returned; particle k is entry k of each column."""

    step: Tensor  # step index i of its latents, int64 [k]
    image: Tensor  # the image of the batch that it belongs to, int64 [k]
    parent: Tensor  # the particle that it descends from, int64 [k]; -1 for a start
    value: Tensor  # by which it was selected, float32 [k]; NaN without a selection


class Recorder:
    """Numbers the particles of one batch in the order in which they take a step.

    Reads what the sampler computes anyway, and draws nothing.

    Args:
        frames: Steps at which the x0 of each particle is kept, in the CPU's memory.
        callback: Called with (i, state) for the particles that go on from step i, 1 .. T - 1, and for the ends, i = T.
    """

    def __init__(self, frames: Collection[int] = (), callback: "Callable[[int, State], object] | None" = None) -> None:
        self.frames, self.callback = frozenset(frames), callback
        self.x0: dict[int, Tensor] = {}  # by particle
        self._columns: list[Particles] = []
        self._count = 0

    @property
    def particles(self) -> Particles:
        """All particles so far."""
        return Particles(*(torch.cat(column) for column in zip(*self._columns, strict=True)))

    def add(self, state: "State") -> Tensor:
        """Records the rows of a state, calls the callback, and returns the rows' numbers, int64 [n]."""
        n, images = len(state.x), torch.tensor(state.context.images)
        own = torch.arange(self._count, self._count + n)
        parent = state._cache[_PARENT].cpu() if _PARENT in state._cache else torch.full((n,), -1)
        step, image = torch.full((n,), state.i), images.repeat_interleave(n // len(images))
        self._columns.append(Particles(step, image, parent, _values(state, images)))
        self._count += n
        if state.i in self.frames and not state.done:  # the ends are the images themselves
            self.x0.update(zip(own.tolist(), state.x0.detach().cpu().unbind(), strict=True))
        if self.callback is not None and state.i > 0:
            self.callback(state.i, state)
        return own.to(state.x.device)


def recorded(state: "State") -> Tensor | None:
    """Returns the numbers of a state's rows, which are recorded at the first call; None without a recorder."""
    recorder = state.context.recorder
    if recorder is not None and _OWN not in state._cache:
        state._cache[_OWN] = recorder.add(state)
    return state._cache.get(_OWN)


def descent(parents: "Tensor | State | None", m: int = 1) -> dict[str, Tensor]:
    """Returns what the cache of m children of each parent, a recorded particle or the end of a chain, holds."""
    numbers = parents if isinstance(parents, Tensor | None) else parents._cache.get(_PARENT)
    return {} if numbers is None else {_PARENT: numbers.repeat_interleave(m)}


def _values(state: "State", images: Tensor) -> Tensor:
    """Returns the value by which each row was selected, if the latest selection left this state, float32 [n]."""
    last = state.context.trace.selections[-1:]
    if last and last[0].i == state.i and last[0].kept.shape[1] * len(images) == len(state.x):
        return last[0].values.gather(1, last[0].kept).float().cpu()[images].flatten()
    return torch.full((len(state.x),), math.nan)
