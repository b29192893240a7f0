"""What the commands on LightningCLI share: processes, registry names, class defaults and errors in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from svdd import Stopped, UserError
from svdd.commands.checkpoints import checkpoint_digest
from svdd.commands.parser import explain
from svdd.runs.processes.group import Group
from svdd.runs.processes.launcher import join

__all__ = ["ModelCLI", "Parser", "refusals"]


class Parser(LightningArgumentParser):
    """Reports a bad argument as the error that `svdd` prints in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError."""
        raise UserError(explain(message))


class ModelCLI(LightningCLI):
    """A command that builds a `GuidedDiffusion` from a configuration.

    Attributes:
        ckpt_sha256: The SHA-256 of the checkpoint, where one is given.
        group: The processes of this command; None for one.
    """

    ckpt_sha256: str | None
    group: Group | None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the folder of the run, and the classes whose arguments can be given without naming them."""
        parser.set_defaults(
            {
                "model.diffusion": {"class_path": "svdd.diffusion.stable_diffusion.StableDiffusion"},
                "model.sampler": {"class_path": "svdd.samplers.svdd.SVDD"},
                "model.value": {"class_path": "svdd.values.posterior_mean.PosteriorMean"},
            }
        )
        parser.add_argument("--output", type=str, default="runs/latest", help="Run folder; a started one continues.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Remove the earlier run in the folder.")
        parser.add_argument(
            "--max_restarts", type=int, default=0, help="How often all processes restart after one of several has died."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Starts or joins the other processes as soon as the Trainer's settings are known."""
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        with refusals():
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
        """Looks at the checkpoint, where Lightning would take settings out of it, which ours do not hold."""
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        self.ckpt_sha256 = None if path is None else checkpoint_digest(path)

    def instantiate_classes(self) -> None:
        """Builds everything; what a constructor refuses is the user's to repair."""
        with refusals():
            super().instantiate_classes()


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what a constructor says about its arguments into the user's error."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(explain(str(error))) from error
