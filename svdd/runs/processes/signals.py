"""SIGINT and SIGTERM end the process at once, or after the current batch while a run is drawing."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

__all__ = ["AGENT", "STOP_EXIT_CODES", "Signals", "die_with_parent", "signals"]

AGENT = "SVDD_AGENT"  # the process id of the svdd command that started this process and reports for it

_SAME_SIGTERM = 0.5  # seconds: a launcher's SIGTERM and the one that it forwards arrive together

STOP_EXIT_CODES = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}


class Signals:
    """Handles both signals in a separate thread, so imports and blocking native calls do not delay them.

    The Python-level handlers do nothing, so no KeyboardInterrupt is raised at an arbitrary place.
    """

    def __init__(self) -> None:
        self.deferred = False  # whether the first signal waits for the current batch; a second one never does
        self.unit = "batch"  # what a deferred signal waits for
        self.exit_code: int | None = None  # 130 or 143 after a deferred signal
        self.quiet = AGENT in os.environ  # whether another process reports the signal
        self._first: dict[str, float] = {}  # when each kind of signal came for the first time
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def listen(self) -> None:
        """Starts the thread; call this in the main thread."""
        self._pipe = heard, woken = socket.socketpair()
        woken.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._run, args=(heard,), name="svdd-signals", daemon=True).start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def install(self) -> None:
        """Replaces the Python-level handlers of a library."""
        if self._pipe is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: None)

    def say(self, message: str) -> None:
        """Writes a line about a signal to stderr, even while the main thread writes there."""
        if not self.quiet:
            with suppress(OSError):
                os.write(2, f"svdd: {message}\n".encode())

    def _run(self, heard: socket.socket) -> None:
        while data := heard.recv(1):
            code, name = 128 + data[0], STOP_EXIT_CODES.get(128 + data[0])
            if name is None:
                continue
            now = time.monotonic()
            again = now - self._first.setdefault(name, now) > (_SAME_SIGTERM if name == "SIGTERM" else 0)
            if not self.deferred or again:
                self.say(f"ended: {name}")
                os._exit(code)
            if self.exit_code is None:
                self.exit_code = code
                self.say(f"{name}: the current {self.unit} is finished first; once more ends it at once")

    def _forget(self) -> None:
        """Restores the defaults in a forked process, which inherits the socket but not the thread."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._pipe = None


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends; other systems do nothing."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # Windows has no library of all symbols, macOS no prctl
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ.get(AGENT, str(os.getppid())) != str(os.getppid()):  # the parent ended before the call
        os._exit(1)


signals = Signals()
