"""The callback that finishes the current batch or epoch on a signal, and waits for the other processes at the end."""

from typing import Any

import lightning as L

from svdd import Stopped
from svdd.runs.processes.group import Group
from svdd.runs.processes.signals import STOP_EXIT_CODES, signals

__all__ = ["StopOnSignal"]


class StopOnSignal(L.Callback):
    """Ends a prediction after the current batch, a training after the current epoch, which has its checkpoint by then.

    All processes end, on SIGTERM with 143, on SIGINT with 130. Before the first batch or epoch and after the last one a
    signal ends the process at once. The hooks raise `Stopped` after a signal or the death of another process. This must
    be the last callback: the writer's `on_exception` then waits until the batch is on disk.

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
        _defer(trainer, "batch")

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends the run if there is a reason to; the batch is on disk, or the writer puts it there before the end.

        Other processes see that this one is alive: it draws no further batch while an earlier one cannot be written.
        """
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on a signal waits for the epoch."""
        _defer(trainer, "epoch")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends all processes at the same epoch if one of them has received a signal."""
        if self.group is not None and signals.exit_code is not None:
            self.group.decide(str(signals.exit_code))
        if trainer.strategy.reduce_boolean_decision(signals.exit_code is not None, all=False):
            _end(signals.exit_code if self.group is None else self.group.check())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the training if a signal came in the last epoch; after this, a signal ends the process at once."""
        self.on_train_epoch_start(trainer, pl_module)
        signals.deferred = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """From now on a signal ends the process at once: the batch is lost."""
        signals.deferred = False


def _defer(trainer: L.Trainer, unit: str) -> None:
    """Makes the first signal wait for the current unit of work."""
    signals.install()  # in place of Lightning's handlers, which wait for other processes
    signals.quiet = signals.quiet or trainer.global_rank > 0
    signals.deferred, signals.unit = True, unit


def _end(code: int | None) -> None:
    if code:
        reason = STOP_EXIT_CODES.get(code, "another process has died or hangs")
        signals.say(f"ended: {reason}; what is finished is kept, and the same command continues")
        raise Stopped(code)
