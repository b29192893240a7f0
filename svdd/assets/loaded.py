"""Weights that several runs of one process load only once.

Each run borrows what it loads, so that two parts of a run never share an object, as in a run of its own. At the next
run all of it is free again.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["borrow", "keeping_weights", "next_run"]

Loaded = TypeVar("Loaded")


class _Kept:
    """The objects of one process."""

    def __init__(self) -> None:
        self.context: Hashable = None  # on what, besides its own settings, the state of a loaded object depends
        self.free: dict[Hashable, list[Any]] = {}
        self.lent: list[tuple[Hashable, Any]] = []


_kept: _Kept | None = None


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Keeps what `borrow` loads until the end of the block."""
    global _kept
    before, _kept = _kept, _Kept()
    try:
        yield
    finally:
        _kept = before


def next_run(context: Hashable, latest_only: bool = False) -> None:
    """Takes back what the last run has borrowed; a run of another context (device, precision) does not get it.

    With `latest_only`, what the last run has not borrowed is dropped, so that memory does not grow with the number of
    different runs.
    """
    if _kept is None:
        return
    if latest_only:
        _kept.free = {}
    for key, loaded in _kept.lent:
        _kept.free.setdefault(key, []).append(loaded)
    _kept.context, _kept.lent = context, []


def borrow(kind: str, key: Hashable, load: Callable[[], Loaded], alone: bool = False) -> Loaded:
    """Returns an object that an earlier run has loaded, or loads it; outside `keeping_weights` always the latter.

    Args:
        kind: The kind of object.
        key: All that determines it; None if it cannot be shared.
        load: Loads it.
        alone: Whether a process keeps only one object of this kind, as it is large.
    """
    if _kept is None or key is None:
        return load()
    whole = (kind, _kept.context, key)
    if not (found := _kept.free.get(whole)):
        if alone:
            _kept.free = {name: objects for name, objects in _kept.free.items() if name[0] != kind}  # type: ignore[index]
        found = [load()]
    loaded = found.pop()
    _kept.lent.append((whole, loaded))
    return loaded
