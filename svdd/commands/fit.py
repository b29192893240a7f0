"""`svdd fit`: trains a learned value on rollouts of the pretrained chain."""

import re
import shlex
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from svdd import say
from svdd.commands.base import ModelCLI
from svdd.commands.parser import as_user_errors
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.processes.group import is_rank_zero
from svdd.runs.processes.stop import StopOnSignal
from svdd.runs.prompts import PromptWarning
from svdd.values.learned import read_checkpoint, to_safetensors
from svdd.values.losses import MeanLoss
from svdd.values.training.checkpoints import Checkpoints, WholeFiles
from svdd.values.training.data import RolloutDataModule
from svdd.values.training.fitting import ValueFitting

__all__ = ["FitCLI"]

# Settings that may change when a training continues: they affect its length, device, logging or speed.
_HARMLESS = re.compile(
    r"trainer(\.(?!(precision|plugins|accumulate_grad_batches|gradient_clip_val|gradient_clip_algorithm|sync_batchnorm"
    r"|limit_train_batches|overfit_batches|fast_dev_run|use_distributed_sampler|reload_dataloaders_every_n_epochs)"
    r"(\.|$)).*)?"
    r"|(output|overwrite|max_restarts|data\.(cache|rollout_batch_size))(\..*)?"
    r"|model\.diffusion\.(chunk_size|compile|attention_backend)(\..*)?"
)

_RESULTS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "value.safetensors")


class FitCLI(ModelCLI):
    """Keeps checkpoints and logs in the output folder, and continues an interrupted training there."""

    command, builds = "fit", (ValueFitting, RolloutDataModule, L.Trainer)
    hidden = ModelCLI.hidden | {"train_dataloaders", "val_dataloaders"}

    def before_instantiate_classes(self) -> None:
        """Claims the output folder for this configuration, and finds the checkpoint to continue from."""
        self.folder = Path(self.settings.output)
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        if not is_rank_zero():
            return
        with as_user_errors():
            prompts = RolloutDataModule(**self.settings.data.as_dict()).dataset
        warnings.filterwarnings("ignore", category=PromptWarning)  # given by now; the prompts are read once more
        self.claim(prompts, _RESULTS, _HARMLESS)
        with os_errors_explained(self.folder):
            self.checkpoints.repair()
            for version in self.folder.glob("logs/version_*") if self.settings.overwrite else ():
                for name in ("metrics.csv", "hparams.yaml"):
                    (version / name).unlink(missing_ok=True)
                with suppress(OSError):  # not empty: it holds a user's files too
                    version.rmdir()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds checkpoints after every epoch and, unless another logger is configured, metrics.csv."""
        if self._get(self.config_init, "trainer.logger", default=False) in (False, None, True):
            kwargs["logger"] = CSVLogger(self.folder, name="logs")
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks += [self.checkpoints, StopOnSignal(self.group)]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        return trainer

    def after_fit(self) -> None:
        """Exports the best weights, which `--model.value.pretrained` takes, and prints the paths."""
        best = next((path for path in (self.checkpoints.best, self.checkpoints.last) if path.is_file()), None)
        if not self.trainer.is_global_zero or best is None:
            return
        file, value = self.folder / "value.safetensors", self.model.value
        with os_errors_explained(self.folder):
            write_atomically(file, to_safetensors(read_checkpoint(str(best))))
        say(f"{type(value).__name__} for {self.model.reward.name} in {self.folder}")
        if best == self.checkpoints.best:
            known = " (1 is that of the mean reward)" if isinstance(value.loss, MeanLoss) else ""
            say(f"best held-out loss {self.checkpoints.score:.4g}{known}, {best}")
        say(f"to guide with it, add this option to `svdd predict`: {shlex.join(['--ckpt_path', str(file)])}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        last = self.checkpoints.last
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": last if last.is_file() else None}
