"""The callback that finishes the current batch on a signal, and waits for the other processes at the end."""

from typing import Any

import lightning as L

from svdd import Stopped
from svdd.runs.processes.group import Group
from svdd.runs.processes.signals import STOP_EXIT_CODES, signals

__all__ = ["StopOnSignal"]


class StopOnSignal(L.Callback):
    """Ends a prediction after the current batch: on SIGTERM with 143, on SIGINT with 130, in all processes.

    Before the first batch and after the summary a signal ends the process at once. This must be the last callback,
    so that the batch has been written. Its hooks raise `Stopped` after a signal or the death of another process.

    Args:
        group: The processes of the run; None for one.
        patience: Seconds without a finished batch anywhere after which a process that has finished stops waiting, > 0.
    """

    def __init__(self, group: Group | None = None, patience: float = 3600.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be > 0 seconds, got {patience}")
        self.group, self.patience = group, patience

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on a signal waits for the batch."""
        signals.install()  # in place of Lightning's handlers, which wait for other processes
        signals.quiet = signals.quiet or trainer.global_rank > 0
        signals.deferred = True

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends the run if there is a reason to; the batch is on disk by now."""
        if self.group is None:
            _end(signals.exit_code)
        else:
            self.group.count_batch()
            _end(self.group.check())

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the other processes: the collectives that follow must not time out."""
        if self.group is not None:
            _end(self.group.wait(self.patience))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run if a signal came after the last batch; after this, a signal ends the process at once."""
        signals.deferred = False
        _end(signals.exit_code)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """From now on a signal ends the process at once: the batch is lost."""
        signals.deferred = False


def _end(code: int | None) -> None:
    if code:
        reason = STOP_EXIT_CODES.get(code, "another process has died or hangs")
        signals.say(f"ended: {reason}; finished images are kept, and the same command continues")
        raise Stopped(code)
