"""The callback that finishes the batch at work on a signal, and waits for the other processes at the end."""

from typing import Any

import lightning as L

from svdd import Stopped
from svdd.runs.processes.group import Group
from svdd.runs.processes.signals import STOP_EXIT_CODES, signals

__all__ = ["StopOnSignal"]


class StopOnSignal(L.Callback):
    """Ends a prediction after the batch at work: on SIGTERM with 143, on SIGINT with 130, whichever process got it.

    Before the first batch and after the summary there is nothing to finish, and a signal ends the process at once.
    It must be the last callback: an earlier one writes the batch.

    Args:
        group: The processes of the run; None for one.
        patience: Seconds that a process which is through waits while no other finishes a batch.

    Raises:
        ValueError: If `patience` is not positive.
    """

    def __init__(self, group: Group | None = None, patience: float = 3600.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be > 0 seconds, got {patience}")
        self.group, self.patience = group, patience

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal waits for the batch."""
        signals.install()  # Lightning has put its own in their place, which waits for other processes
        signals.quiet = signals.quiet or trainer.global_rank > 0
        signals.deferred = True

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ends the run if that was asked for; the batch is on disk by now.

        Raises:
            Stopped: After a signal, or when another process has died.
        """
        if self.group is None:
            _end(signals.exit_code)
        else:
            self.group.count_batch()
            _end(self.group.check())

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the other processes, so that they come to the collectives that follow together.

        Raises:
            Stopped: After a signal, or when another process has died.
        """
        if self.group is not None:
            _end(self.group.wait(self.patience))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal ends the process at once: the summary is on disk.

        Raises:
            Stopped: If there has been one since the last batch.
        """
        signals.deferred = False
        _end(signals.exit_code)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The batch is lost, so there is nothing to finish."""
        signals.deferred = False


def _end(code: int | None) -> None:
    if code:
        reason = STOP_EXIT_CODES.get(code, "another process was lost")
        signals.say(f"ended: {reason}; finished images are kept, and the same command continues")
        raise Stopped(code)
