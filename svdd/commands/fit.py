"""`svdd fit`: trains a learned value on rollouts of the pretrained chain."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from svdd.commands.base import ModelCLI
from svdd.commands.parser import as_user_errors
from svdd.runs.config import CONFIG, differences, read_config, write_config
from svdd.runs.files import RunError, os_errors_explained, write_atomically
from svdd.runs.output import hold
from svdd.runs.processes.group import is_rank_zero
from svdd.runs.prompts import PromptWarning
from svdd.values.learned import read_checkpoint, to_safetensors
from svdd.values.losses import MeanLoss
from svdd.values.training.data import RolloutDataModule
from svdd.values.training.fitting import ValueFitting

__all__ = ["FitCLI"]

# Settings that may change when a training continues: they affect its length, device, logging or speed.
_HARMLESS = re.compile(
    r"trainer(\.(?!(precision|plugins|accumulate_grad_batches|gradient_clip_val|gradient_clip_algorithm|sync_batchnorm"
    r"|limit_train_batches|overfit_batches|fast_dev_run|use_distributed_sampler|reload_dataloaders_every_n_epochs)"
    r"(\.|$)).*)?"
    r"|(output|overwrite|max_restarts|data\.(cache|rollout_batch_size)|model\.diffusion\.(chunk_size|compile))(\..*)?"
)

_BEFORE_A_CHECKPOINT = {".lock", CONFIG, f"{CONFIG}.tmp", "logs"}  # with only these, settings may still change


class FitCLI(ModelCLI):
    """Keeps checkpoints and logs in the output folder, and continues an interrupted training there."""

    command, builds = "fit", (ValueFitting, RolloutDataModule, L.Trainer)
    hidden = ModelCLI.hidden | {"train_dataloaders", "val_dataloaders", "ckpt_path"}
    classes: ClassVar = ModelCLI.classes | {"value": "svdd.values.latent_conv.LatentConvValue"}
    defaults: ClassVar = {"output": "runs/fit", "trainer.max_epochs": 20, "trainer.num_sanity_val_steps": 0}

    def before_instantiate_classes(self) -> None:
        """Claims the output folder for this configuration, until the end."""
        self.folder = Path(self.settings.output)
        if not is_rank_zero():
            return
        config = self.resolved()
        with as_user_errors():
            config["data"]["prompts_sha256"] = RolloutDataModule(**self.settings.data.as_dict()).digest
        warnings.filterwarnings("ignore", category=PromptWarning)  # given by now; the prompts are read once more
        with os_errors_explained(self.folder):
            self._around.callback(hold(self.folder, self.command).release)
            recorded = known.config if (known := read_config(self.folder)) else {}
            names = {path.name for path in self.folder.iterdir()}
            if self.settings.overwrite:
                for name in ("checkpoints", "logs"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / "value.safetensors").unlink(missing_ok=True)
            elif names - _BEFORE_A_CHECKPOINT and (changed := differences(recorded, config, _HARMLESS)):
                found = f"{self.folder} holds a training with other settings: {'; '.join(changed)}"
                raise RunError(f"{found}. Choose another --output, or remove the old one with --overwrite true")
            write_config(self.folder, self.command, config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds checkpoints after every epoch and, unless another logger is configured, metrics.csv."""
        self._checkpoints = ModelCheckpoint(
            self.folder / "checkpoints", "best", monitor="val_loss", save_last=True, enable_version_counter=False
        )
        if self._get(self.config_init, "trainer.logger", default=False) in (False, None, True):
            kwargs["logger"] = CSVLogger(self.folder, name="logs")
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self._checkpoints)
        return trainer

    def after_fit(self) -> None:
        """Exports the best weights, which `--model.value.pretrained` takes, and prints the paths."""
        best = Path(self._checkpoints.best_model_path or self.folder / "checkpoints" / "last.ckpt")
        if not self.trainer.is_global_zero or not best.is_file():
            return
        file, value = self.folder / "value.safetensors", self.model.value
        with os_errors_explained(self.folder):
            write_atomically(file, to_safetensors(read_checkpoint(str(best))))
        print(f"{type(value).__name__} for {self.model.reward.name} in {self.folder}")
        if (score := self._checkpoints.best_model_score) is not None:
            known = " (1 is that of the mean reward)" if isinstance(value.loss, MeanLoss) else ""
            print(f"best held-out loss {float(score):.4g}{known}, {best}")
        print(f"use it: svdd predict ... --ckpt_path {file}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        last = self.folder / "checkpoints" / "last.ckpt"
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": last if last.is_file() else None}
