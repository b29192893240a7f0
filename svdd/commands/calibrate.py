"""`svdd calibrate`: how well a value foretells the reward, step by step."""

from pathlib import Path
from typing import Any

import lightning as L

from svdd.calibration import plot, write
from svdd.commands.base import ModelCLI

__all__ = ["CalibrateCLI", "CalibrationTrainer"]


class CalibrationTrainer(L.Trainer):
    """A Trainer whose test loop goes by the command's name."""

    def calibrate(self, model: Any, datamodule: Any, ckpt_path: str | None = None) -> None:
        """Runs the test loop without its own table."""
        self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)


class CalibrateCLI(ModelCLI):
    """Draws fresh unguided chains for the prompts and writes table and plot into the output folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One command, run by `CalibrationTrainer`."""
        return {"calibrate": {"model", "datamodule"}}

    def after_calibrate(self) -> None:
        """Writes what was measured and says where."""
        if not self.trainer.is_global_zero:
            return
        folder, table = Path(self.config["calibrate"].output), self.model.calibration
        name = type(self.model.value).__name__
        chains = self.datamodule.num_prompts * self.model.images_per_prompt
        about = {"value": name, "reward": self.model.reward.name, "chains": chains, "config": self.resolved()}
        print(write(folder, table, about))
        drawn = plot(folder / "calibration.png", {name: table}, f"{name} for {self.model.reward.name}, {chains} chains")
        print(f"wrote {folder}/calibration.csv, calibration.json{' and calibration.png' if drawn else ''}")
        if not drawn:
            print("no plot: it needs matplotlib (pip install 'svdd[plot]')")
