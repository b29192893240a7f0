"""Signs of life that the processes of one run leave for each other in its folder."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["DONE", "FAILED", "GONE", "RUNNING", "STOPPING", "Peers"]

RUNNING, DONE, STOPPING, FAILED, GONE = "running", "done", "stopping", "failed", "gone"

_NAME = re.compile(r"\.rank-\d{5,}")


class Peers:
    """What this process says to the others, and what they have said.

    Each process rewrites a file of a few bytes, `.rank-00003`, with a count and what it is doing. A process whose file
    has not changed for a while is lost: stopped, or its machine is down. Clocks are never compared between machines,
    and a file is opened anew for every look, so that it works on network file systems too.

    Args:
        folder: The run folder, which all processes see.
        rank: This process.
        world_size: The number of processes.
        patience: Seconds without a change after which a process counts as lost.
        clock: Seconds that never run backwards.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own, self._patience, self._clock = _path(folder, rank), patience, clock
        self._paths = {other: _path(folder, other) for other in range(world_size) if other != rank}
        self._words: dict[int, bytes] = dict.fromkeys(self._paths, b"")
        self._changed: dict[int, float] = dict.fromkeys(self._paths, clock())
        self._looked = clock()
        self._count = 0

    def say(self, state: str) -> None:
        """Tells the others that this process lives and what it is doing; that a disk is full is no reason to end."""
        self._count += 1
        with suppress(OSError):
            descriptor = os.open(self._own, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, f"{self._count:012d} {state:<10}\n".encode(), 0)  # in place: no new block needed
            finally:
                os.close(descriptor)

    def look(self) -> None:
        """Reads what the others say. A process that was itself held up judges nobody by the time it missed."""
        now = self._clock()
        if now - self._looked > self._patience / 2:
            self._changed = dict.fromkeys(self._paths, now)
        self._looked = now
        for rank, path in self._paths.items():
            words = self._words[rank]
            try:
                words = path.read_bytes()
            except FileNotFoundError:
                words = GONE.encode() if words else words  # it said goodbye, or nothing yet
            except OSError:
                continue
            if words != self._words[rank]:
                self._words[rank], self._changed[rank] = words, now

    def state(self, rank: int) -> str:
        """Returns what another process was doing at the last look; nothing heard yet reads as running."""
        return (self._words[rank].decode("ascii", "replace").split() or [RUNNING])[-1]

    def ranks(self, *states: str) -> list[int]:
        """Returns the other processes that are in one of these states."""
        return [rank for rank in self._paths if self.state(rank) in states]

    def lost(self) -> list[int]:
        """Returns the processes that have said nothing for too long and were not through."""
        now = self._clock()
        alive = self.ranks(RUNNING, DONE)
        return [rank for rank in alive if now - self._changed[rank] > self._patience]

    def leave(self) -> None:
        """Says goodbye."""
        with suppress(OSError):
            self._own.unlink()

    @staticmethod
    def forget(folder: Path) -> None:
        """Removes what the processes of an earlier run have left; for rank 0, before the others begin."""
        with suppress(OSError):
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name):
                    path.unlink()


def _path(folder: Path, rank: int) -> Path:
    return folder / f".rank-{rank:05d}"
