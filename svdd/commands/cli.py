"""Runs the commands that need a model: imports what one of them needs, and hands over to LightningCLI."""

import logging
import sys
import warnings
from collections.abc import Sequence

from svdd.commands.base import ModelCLI, Parser
from svdd.commands.class_change import forget_arguments_on_class_change
from svdd.commands.registry import import_all
from svdd.guided_diffusion import GuidedDiffusion

__all__ = ["run", "run_score"]


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs a command that needs a model.

    Args:
        arguments: The command line, beginning with the command's name; the process's own by default.

    Raises:
        UserError: For everything that the user can repair.
    """
    import_all()
    forget_arguments_on_class_change()
    _hush()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, datamodule, trainer = _command(words[0])
    command(
        GuidedDiffusion,
        datamodule,
        trainer_class=trainer,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"enable_model_summary": False, "logger": False, "enable_checkpointing": False},
        auto_configure_optimizers=False,
        parser_class=Parser,
        args=None if arguments is None else words,
    )


def run_score(words: Sequence[str]) -> None:
    """Runs `svdd score`.

    Args:
        words: The command line after the command's name.

    Raises:
        UserError: For everything that the user can repair.
    """
    import_all()
    forget_arguments_on_class_change()
    _hush()
    from svdd.commands.score import score

    score(words)


def _command(name: str) -> tuple[type[ModelCLI], type, type]:
    """Imports what one command needs: its class, its data and its trainer."""
    import lightning as L

    if name == "fit":
        from svdd.commands.fit import FitCLI
        from svdd.values.training.data import RolloutDataModule

        return FitCLI, RolloutDataModule, L.Trainer
    from svdd.runs.prompts import PromptDataModule

    if name == "calibrate":
        from svdd.commands.calibrate import CalibrateCLI, CalibrationTrainer

        return CalibrateCLI, PromptDataModule, CalibrationTrainer
    from svdd.commands.predict import PredictCLI

    return PredictCLI, PromptDataModule, L.Trainer


def _hush() -> None:
    """Keeps remarks of the libraries that no user can act on out of the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    for message in (
        "isinstance.treespec, LeafSpec",
        "have many workers",
        "when using `ckpt_path`, callbacks",  # of the training; a prediction has its own
        "ranks is zero",
        "LightningCLI's args parameter",
        "Cannot enable progress bars",  # we turned them off ourselves
        "module\\(s\\) in eval mode",  # the pretrained model, on purpose
        "smaller than the logging interval",
        "exists and is not empty",  # a training that continues
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
