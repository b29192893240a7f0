"""The callback that ends a process in which a step hangs, in a reward or in a kernel of the device."""

import faulthandler
import os
import sys
import threading
import time
from typing import Any

import lightning as L

from svdd import printable
from svdd.runs.background import Background

__all__ = ["StepTimeout"]

_MARGIN = 5.0  # seconds after which the process ends without a message, if native code blocks the interpreter


class StepTimeout(L.Callback):
    """Ends the process with exit code 1 if no denoising step, value or batch is finished within `seconds`.

    The message names the line of Python code that was running. Nothing that is on disk is lost. If the writer hangs, no
    second batch is finished.

    Args:
        seconds: The longest time for one step, with the evaluation of all its candidates, > 0; None turns it off.
    """

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not 0 < seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"step_timeout must be > 0 seconds, got {seconds}")
        self.seconds = seconds
        self._last, self._over = 0.0, threading.Event()

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Starts the watch, after the callbacks that follow the steps themselves."""
        if self.seconds is None:
            return
        follow, self._over = pl_module.on_step, threading.Event()

        def step(i: int, value: float | None) -> None:
            self.progress()
            if follow is not None:
                follow(i, value)

        pl_module.on_step = step
        self.progress()
        arguments = (self.seconds, self._over, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="svdd-watchdog", daemon=True).start()

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Counts the loading of a batch as progress."""
        self.progress()

    on_predict_batch_end = on_predict_batch_start

    def on_predict_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends the watch: waiting for other processes is no step."""
        self._over.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    on_exception = on_predict_epoch_end

    def progress(self) -> None:
        """Notes that the process is not stuck."""
        if self.seconds is not None:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self.seconds + _MARGIN, exit=True)

    def _watch(self, seconds: float, over: threading.Event, main: int) -> None:
        while not over.wait(max(0.05, min(self._last + seconds - time.monotonic(), 60.0))):
            if time.monotonic() - self._last < seconds:
                continue
            frame = sys._current_frames()[Background.awaited or main]
            message = (
                f"svdd: error: no step was finished within {seconds:g} s (step_timeout); {frame.f_code.co_filename}:"
                f"{frame.f_lineno} was running; finished images are kept, and the same command continues\n"
            )
            os.write(2, printable(message).encode())  # the main thread may hold the lock of sys.stderr
            os._exit(1)
