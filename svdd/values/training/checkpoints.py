"""The checkpoints of a training: whole at any moment, so that a killed training continues from the newest."""

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from svdd import first_line, say
from svdd.runs.files import OtherRun, os_errors_explained, write_atomically
from svdd.values.learned import HEADER

__all__ = ["Checkpoints", "WholeFiles"]

_ENTRIES = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops", "global_step", HEADER}


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; Lightning's own way goes through TMPDIR, and copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes the file, or leaves the old one; addresses such as `s3://` are left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer, file = io.BytesIO(), Path(path)
        torch.save(checkpoint, buffer)
        with os_errors_explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, buffer.getvalue())


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` after each epoch and, before it, `best.ckpt` if the held-out loss is the lowest so far.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.score = math.inf  # the lowest held-out loss so far

    def repair(self) -> None:
        """Makes `last.ckpt` the newest whole checkpoint, and removes damaged ones, with a message.

        A kill between the two writes leaves `best.ckpt` the newer one. Raises UserError for a file of another kind.
        """
        steps = {path: _step(path) for path in (self.last, self.best) if path.is_file()}
        whole = {path: step for path, step in steps.items() if step is not None}
        newest = max(whole, key=whole.__getitem__, default=None)
        for path in steps.keys() - whole.keys():
            then = f"continues from {newest.name}" if newest else "starts again"
            say(f"svdd: {path} is damaged and was removed: the training {then}", error=True)
            path.unlink()
        if newest == self.best:
            write_atomically(self.last, self.best.read_bytes())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Ends a training that had been stopped early before it was continued; Lightning would add an epoch.

        With `max_steps` Lightning would end the last epoch once more: it begins the next one instead.
        """
        stopped = [callback.wait_count >= callback.patience for callback in trainer.early_stopping_callbacks]
        trainer.should_stop = trainer.should_stop or any(stopped)
        loop = trainer.fit_loop
        if loop.restarting and loop.epoch_loop.batch_progress.is_last_batch:
            for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
                each._restarting = False
                each.reset_restart_stage()
            loop.epoch_progress.current.completed = loop.epoch_progress.current.processed

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the checkpoints; every process takes part."""
        if trainer.fast_dev_run:
            return
        if (score := float(trainer.callback_metrics.get("val_loss", math.inf))) < self.score:
            self.score = score
            trainer.save_checkpoint(self.best)
        trainer.save_checkpoint(self.last)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint stores of this object."""
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it; without `best.ckpt`, the next epoch is the best."""
        self.score = state_dict["score"] if self.best.is_file() else math.inf


def _step(path: Path) -> int | None:
    """Returns the optimizer steps that a checkpoint of a training has behind it; None if the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # PyTorch does not compare checksums
                return None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return None
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # an object of a user's own callback, or a file of something else
        raise OtherRun(f"{path} cannot be continued from: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _ENTRIES:
        raise OtherRun(f"{path} is no checkpoint of `svdd fit`")
    return checkpoint["global_step"]
