"""SIGINT and SIGTERM: they end the process at once, or after the batch at work while a run is drawing."""

import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

__all__ = ["AGENT", "STOP_EXIT_CODES", "Signals", "die_with_parent", "signals"]

AGENT = "SVDD_AGENT"  # the process id of the svdd command that started this process and reports for it

STOP_EXIT_CODES = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}


class Signals:
    """Handles the two signals in a thread of its own, so that imports and waits outside Python do not delay them.

    The Python-level handlers do nothing. No KeyboardInterrupt is raised at an arbitrary place.

    Attributes:
        deferred: Whether the first signal waits for the batch at work; a second SIGINT ends the process all the same.
        exit_code: 130 or 143 after a deferred signal, else None.
        quiet: Whether another process reports the signal.
    """

    def __init__(self) -> None:
        self.deferred, self.quiet = False, AGENT in os.environ
        self.exit_code: int | None = None
        self._interrupts = 0
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def listen(self) -> None:
        """Starts to listen, for the life of the process; call it in the main thread."""
        self._pipe = heard, woken = socket.socketpair()
        woken.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._run, args=(heard,), name="svdd-signals", daemon=True).start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def install(self) -> None:
        """Installs the Python-level handlers, in place of those of a library."""
        if self._pipe is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _ignore)

    def say(self, message: str) -> None:
        """Writes a line to stderr about a signal, even while the main thread writes there."""
        if not self.quiet:
            with suppress(OSError):
                os.write(2, f"svdd: {message}\n".encode())

    def _run(self, heard: socket.socket) -> None:
        while data := heard.recv(1):
            if (code := 128 + data[0]) in STOP_EXIT_CODES:
                self._on_signal(code)

    def _on_signal(self, code: int) -> None:
        name = STOP_EXIT_CODES[code]
        self._interrupts += name == "SIGINT"
        if not self.deferred or (name == "SIGINT" and self._interrupts > 1):
            self.say(f"ended: {name}")
            os._exit(code)
        if self.exit_code is None:
            self.exit_code = code
            again = "; once more ends it at once" if name == "SIGINT" else ""
            self.say(f"{name}: the batch at work is finished first{again}")

    def _forget(self) -> None:
        """Restores the defaults in a forked process, which inherits the socket but not the thread."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._pipe = None


def _ignore(number: int, frame: Any) -> None:
    """Does nothing: the thread has heard the signal."""


def die_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it ends; elsewhere nothing happens."""
    import ctypes

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ.get(AGENT, str(os.getppid())) != str(os.getppid()):  # it ended before the call
        os._exit(1)


signals = Signals()
