"""The processes that this one has started: found from their first moment, waited for, and never left behind."""

import signal
import subprocess
from contextlib import suppress
from typing import Any

import lightning as L

__all__ = ["TOLD", "Children"]

TOLD = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT))  # codes of a process that was told to end


class Children:
    """The processes that a Trainer has started from this one; none before it is known."""

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._taken: list[subprocess.Popen[bytes]] = []

    def follow(self, trainer: L.Trainer) -> None:
        """Finds the processes that the Trainer starts, also before they are taken over."""
        self._trainer = trainer

    def take(self, trainer: L.Trainer) -> None:
        """Takes the started processes over from Lightning, which would kill this one in the middle of a batch."""
        self._trainer = trainer
        processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        self._taken += processes
        processes.clear()

    def codes(self) -> list[int | None]:
        """Returns the exit code of each process as subprocess has it: None while it runs, negative for a signal."""
        return [child.poll() for child in self._all()]

    def kill(self) -> None:
        """Ends all that still run, at once."""
        for child in self._all():
            with suppress(OSError):
                child.kill()

    def _all(self) -> list[subprocess.Popen[bytes]]:
        started = [] if self._trainer is None else getattr(self._trainer.strategy.launcher, "procs", [])
        return [*self._taken, *(child for child in started if isinstance(child, subprocess.Popen))]
