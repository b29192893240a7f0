"""`svdd calibrate`: how well a value foretells the reward, step by step."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from svdd.commands.base import ModelCLI
from svdd.runs.config import differences
from svdd.runs.files import RunError, explained
from svdd.values.training.calibration import FILES, check_counts, plot, read_config, write

__all__ = ["CalibrateCLI", "CalibrationTrainer"]


class CalibrationTrainer(L.Trainer):
    """A Trainer whose test loop goes by the command's name."""

    def calibrate(self, model: Any, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Runs the test loop without its own table."""
        self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)


class CalibrateCLI(ModelCLI):
    """Draws fresh unguided chains for the prompts and writes table and plot into the output folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One command, run by `CalibrationTrainer`."""
        return {"calibrate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds an output folder of its own: the folder of a run or a training is theirs."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"output": "runs/calibration"})

    def before_instantiate_classes(self) -> None:
        """Looks at the output folder, which costs nothing, before weights are loaded, which does."""
        config = self.config["calibrate"]
        self.folder = Path(config.output)
        with explained(self.folder):
            self._check_folder(config.overwrite)

    def before_calibrate(self) -> None:
        """Refuses too few steps or chains before any is drawn."""
        chains = self.datamodule.num_prompts * self.model.images_per_prompt
        check_counts(self.model.diffusion.num_inference_steps, chains)

    def after_calibrate(self) -> None:
        """Writes what was measured and says where."""
        if not self.trainer.is_global_zero:
            return
        folder, table = self.folder, self.model.calibration
        name = type(self.model.value).__name__
        chains = self.datamodule.num_prompts * self.model.images_per_prompt
        about = {"value": name, "reward": self.model.reward.name, "chains": chains, "config": self.resolved()}
        print(write(folder, table, about))
        drawn = plot(folder / "calibration.png", {name: table}, f"{name} for {self.model.reward.name}, {chains} chains")
        print(f"wrote {folder}/calibration.csv, calibration.json{' and calibration.png' if drawn else ''}")
        if not drawn:
            print("no plot: it needs matplotlib (pip install 'svdd[plot]')")

    def _check_folder(self, overwrite: bool) -> None:
        """The same calibration may be repeated where it was, another one only takes its place when told to."""
        recorded = self.folder / FILES[0]
        if not recorded.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(f"{self.folder} is not empty and holds no calibration; choose another --output")
        elif not overwrite and (changed := differences(read_config(recorded), self.resolved())):
            raise RunError(
                f"{self.folder} holds a calibration with other settings: {'; '.join(changed)}. "
                "Choose another --output, or replace the old one with --overwrite true"
            )
