"""`svdd calibrate`: how well a value predicts the reward, step by step."""

import inspect
import shlex
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from svdd import UserError, say
from svdd.commands.base import ModelCLI
from svdd.commands.parser import as_user_errors
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.config import HARMLESS_IF_REPRODUCIBLE
from svdd.runs.processes.group import is_rank_zero
from svdd.runs.prompts import PromptDataModule
from svdd.values.training.calibration import FILES, SCHEDULE, Calibration, require_chains, write, write_schedule

__all__ = ["CalibrateCLI", "CalibrationTrainer"]

_UNUSED = inspect.signature(GuidedDiffusion).parameters.keys() - inspect.signature(Calibration).parameters.keys()


class CalibrationTrainer(L.Trainer):
    """A Trainer whose test loop goes by the command's name."""

    def calibrate(self, model: Any, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Runs the test loop without its own table."""
        self.test(model, datamodule=datamodule, verbose=False)


class CalibrateCLI(ModelCLI):
    """Draws new unguided chains for the prompts and writes table and plot into the output folder."""

    command, builds = "calibrate", (Calibration, PromptDataModule, CalibrationTrainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accepts, and hides from `--help`, the settings of `svdd predict` that a shared configuration holds."""
        super().add_arguments_to_parser(parser)
        for name in _UNUSED:
            parser.add_argument(f"--model.{name}", type=Any, default=None, help=SUPPRESS)

    def before_instantiate_classes(self) -> None:
        """Names the settings that have no effect, and claims the output folder before weights are loaded."""
        settings = self.settings
        unused = [f"model.{name}" for name in sorted(_UNUSED) if settings.model.pop(name, None) is not None]
        if unused:
            say(f"svdd: calibrate draws unguided chains and does not use {', '.join(unused)}", error=True)
        self.folder = Path(settings.output)
        if not is_rank_zero():
            return
        with as_user_errors():
            self.prompts = PromptDataModule(**settings.data.as_dict())
        self._around.callback(self.prompts.teardown)
        self.claim(self.prompts.dataset, FILES, HARMLESS_IF_REPRODUCIBLE)  # they may change a measurement's last bits

    def before_calibrate(self) -> None:
        """Refuses prompts that lack what the reward reads, and too few chains, before any is drawn."""
        if is_rank_zero():
            self.datamodule.adopt(self.prompts)
        dataset = self.datamodule.dataset
        self.model.columns.check(dataset, dataset.place)
        self.chains = len(dataset) * self.model.images_per_prompt
        require_chains(self.chains)

    def after_calibrate(self) -> None:
        """Writes the results and prints the paths."""
        if not self.trainer.is_global_zero:
            return
        name, reward = type(self.model.value).__name__, self.model.reward.name
        about = {"value": name, "reward": reward, "chains": self.chains}
        text, plotted = write(self.folder, self.model.table, about, f"{name} for {reward}, {self.chains} chains")
        say(text)
        say(f"wrote {self.folder}/calibration.csv, calibration.json{' and calibration.png' if plotted else ''}")
        if not plotted:
            say("no plot: it needs matplotlib (pip install 'svdd[plot]')")
        if self.model.fit_schedule is not None:
            try:
                schedule = self.model.fit_schedule()
            except UserError as error:
                wrote = f"the table of the value is written to {self.folder}, without {SCHEDULE}"
                raise UserError(f"{error}; {wrote}") from None
            say(write_schedule(self.folder, schedule))
            option = shlex.join(["--config", f"{self.folder}/{SCHEDULE}"])
            say(f"wrote {self.folder}/{SCHEDULE}; to draw with it, add this option to `svdd predict`: {option}")
