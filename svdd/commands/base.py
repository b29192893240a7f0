"""The base of the commands on LightningCLI: predict, fit and calibrate."""

import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from svdd import Stopped
from svdd.commands.parser import Parser, as_user_errors
from svdd.runs.processes.group import Group
from svdd.runs.processes.launcher import join
from svdd.values.pretrained import learned_class

__all__ = ["ModelCLI"]


class ModelCLI(LightningCLI):
    """A command that builds a LightningModule, its data and a Trainer from a configuration.

    Attributes:
        builds: The classes of module, data module and Trainer.
        group: The processes of this command; None for one.
    """

    builds: ClassVar[tuple[type[L.LightningModule], type[L.LightningDataModule], type[L.Trainer]]]
    group: Group | None

    def __init__(self, words: Sequence[str] | None) -> None:
        """Runs the command.

        Args:
            words: The command line, beginning with the command's name; the process's own by default.
        """
        module, data, trainer = self.builds
        with ExitStack() as self._around:  # what is released when the command ends
            super().__init__(
                module,
                data,
                trainer_class=trainer,
                save_config_callback=None,
                seed_everything_default=False,
                trainer_defaults={"enable_model_summary": False, "logger": False, "enable_checkpointing": False},
                auto_configure_optimizers=False,
                parser_class=Parser,
                args=None if words is None else list(words),
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the output folder, and the classes whose arguments can be given without naming them."""
        defaults = {
            "diffusion": "svdd.diffusion.stable_diffusion.StableDiffusion",
            "sampler": "svdd.samplers.svdd.SVDD",
            "value": "svdd.values.posterior_mean.PosteriorMean",
        }
        known = inspect.signature(self.builds[0]).parameters
        parser.set_defaults({f"model.{k}": {"class_path": path} for k, path in defaults.items() if k in known})
        parser.add_argument("--output", type=str, default="runs/latest", help="Run folder; a started one continues.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Remove the earlier run in the folder.")
        parser.add_argument(
            "--max_restarts", type=int, default=0, help="How often all processes restart after one of several has died."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Starts or joins the other processes as soon as the Trainer's settings are known."""
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        with as_user_errors():
            self.group = join(config.trainer, config.max_restarts, sys.argv[1:] if args is None else args)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; an error because another process has died is left to that process to explain.

        Raises:
            Stopped: In place of such an error.
        """
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if self.group is not None and self.group.is_broken():
                raise Stopped(1) from error
            raise
        if self.group is not None:
            self.group.leave()

    def resolved(self) -> dict[str, Any]:
        """Returns the whole configuration of the command as plain values."""
        plain = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False))
        plain.pop("config", None)
        return plain

    def _parse_ckpt_path(self) -> None:
        """Makes `--ckpt_path FILE` select the value in the file, where Lightning would read settings from it."""
        config = self.config[self.config["subcommand"]]
        path = config.get("ckpt_path")
        if path is None:
            return
        known = learned_class(path)  # also refuses what is not a checkpoint
        config["ckpt_path"] = None
        if "pretrained" not in config.model.value.get("init_args", {}):
            config.model.value = Namespace(class_path=f"{known.__module__}.{known.__name__}", init_args=Namespace())
        config.model.value.init_args.pretrained = path

    def instantiate_classes(self) -> None:
        """Builds everything; a constructor's complaint about its arguments becomes a `UserError`."""
        with as_user_errors():
            super().instantiate_classes()
