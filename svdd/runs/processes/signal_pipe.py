"""Hears signals whatever Python is doing, for a thread that waits."""

import os
import select
import signal
from contextlib import suppress

__all__ = ["Bell"]

_DONE = 0  # no signal has this number


class Bell:
    """A pipe into which every signal of this process falls, also while its main thread waits outside of Python.

    It is made and closed in the main thread, and waited at in another.
    """

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        for descriptor in (self._out, self._in):
            os.set_blocking(descriptor, False)
        self._former = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)

    def wait(self, seconds: float) -> list[int]:
        """Returns the signals that have come, as soon as there is one; [] after the time, or once it is rung."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        heard = os.read(self._out, 512) if poll.poll(seconds * 1000) else b""
        return [number for number in heard if number != _DONE]

    def ring(self) -> None:
        """Ends the wait."""
        with suppress(BlockingIOError):
            os.write(self._in, bytes([_DONE]))

    def close(self) -> None:
        """Leaves signals as they were."""
        signal.set_wakeup_fd(self._former)
        for descriptor in (self._out, self._in):
            os.close(descriptor)
