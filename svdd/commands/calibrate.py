"""`svdd calibrate`: how well a value predicts the reward, step by step."""

import inspect
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from svdd import say
from svdd.commands.base import ModelCLI
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.config import HARMLESS_IF_REPRODUCIBLE, differences
from svdd.runs.files import RunError, os_errors_explained
from svdd.runs.prompts import PromptDataModule
from svdd.values.training.calibration import FILES, Calibration, plot, read_config, require_chains, write

__all__ = ["CalibrateCLI", "CalibrationTrainer"]

_UNUSED = inspect.signature(GuidedDiffusion).parameters.keys() - inspect.signature(Calibration).parameters.keys()


class CalibrationTrainer(L.Trainer):
    """A Trainer whose test loop goes by the command's name."""

    def calibrate(self, model: Any, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Runs the test loop without its own table."""
        self.test(model, datamodule=datamodule, verbose=False)


class CalibrateCLI(ModelCLI):
    """Draws new unguided chains for the prompts and writes table and plot into the output folder."""

    purpose = "Measures how well a value predicts the reward, step by step."
    command, builds = "calibrate", (Calibration, PromptDataModule, CalibrationTrainer)
    defaults: ClassVar = {"output": "runs/calibration"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accepts, and hides from `--help`, the settings of `svdd predict` that a shared configuration holds."""
        super().add_arguments_to_parser(parser)
        for name in _UNUSED:
            parser.add_argument(f"--model.{name}", type=Any, default=None, help=SUPPRESS)

    def before_instantiate_classes(self) -> None:
        """Names the settings that have no effect, and checks the output folder before weights are loaded."""
        config = self.settings
        unused = [f"model.{name}" for name in sorted(_UNUSED) if config.model.pop(name, None) is not None]
        if unused:
            say(f"svdd: calibrate draws unguided chains and does not use {', '.join(unused)}", error=True)
        self.folder = Path(config.output)
        recorded = self.folder / FILES[0]
        with os_errors_explained(self.folder):
            if not recorded.exists() and self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(f"{self.folder} is not empty and holds no calibration; choose another --output")
            known = recorded.exists() and not config.overwrite
            if known and (
                changed := differences(
                    read_config(recorded), self.resolved(), HARMLESS_IF_REPRODUCIBLE
                )  # but for rounding
            ):
                found = f"{self.folder} holds a calibration with other settings: {'; '.join(changed)}"
                raise RunError(f"{found}. Choose another --output, or replace the old one with --overwrite true")

    def before_calibrate(self) -> None:
        """Refuses too few chains before any is drawn."""
        self.chains = len(self.datamodule.dataset) * self.model.images_per_prompt
        require_chains(self.chains)

    def after_calibrate(self) -> None:
        """Writes the results and prints the paths."""
        if not self.trainer.is_global_zero:
            return
        folder, table = self.folder, self.model.table
        name, reward = type(self.model.value).__name__, self.model.reward.name
        say(write(folder, table, {"value": name, "reward": reward, "chains": self.chains, "config": self.resolved()}))
        plotted = plot(folder / FILES[2], {name: table}, f"{name} for {reward}, {self.chains} chains")
        say(f"wrote {folder}/calibration.csv, calibration.json{' and calibration.png' if plotted else ''}")
        if not plotted:
            say("no plot: it needs matplotlib (pip install 'svdd[plot]')")
