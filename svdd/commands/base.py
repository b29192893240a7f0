"""The base of the commands on LightningCLI: predict, fit and calibrate."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from svdd import Stopped, UserError
from svdd.commands.own_code import own_error
from svdd.commands.parser import Parser, as_user_errors, explain, with_shipped_configs
from svdd.commands.settings.own import COMMANDS, add_options
from svdd.runs.changes import require_same
from svdd.runs.command_line import overwriting
from svdd.runs.config import HARMLESS, read_config, write_config
from svdd.runs.files import OtherRun, RunError, os_errors_explained
from svdd.runs.output import hold
from svdd.runs.processes.environment import restarted
from svdd.runs.processes.group import Group
from svdd.runs.processes.launcher import join
from svdd.runs.prompts import PromptDataset
from svdd.runs.recorded_prompts import write_prompts
from svdd.runs.secrets import redacted, refuse_secrets
from svdd.values.learned import LearnedValue
from svdd.values.pretrained import learned_class

__all__ = ["ModelCLI"]

_HALF = {"bf16": "bfloat16", "16": "float16"}  # by the beginning of `trainer.precision`


class ModelCLI(LightningCLI):
    """A command that builds a module, its data and a Trainer from `words`, the command line after its name."""

    command: ClassVar[str]  # its name, a key of COMMANDS, and that of the Trainer's method
    builds: ClassVar[tuple[type[L.LightningModule], type[L.LightningDataModule], type[L.Trainer]]]
    folder: Path  # the output folder
    hidden = frozenset(  # arguments of the Trainer's method that are no options
        {"model", "datamodule", "dataloaders", "return_predictions", "weights_only", "ckpt_path"}
    )

    def __init__(self, words: list[str]) -> None:
        self._words = [self.command, *words]
        self.about = COMMANDS[self.command]
        with self._other_run_explained(), ExitStack() as self._around:  # what is released when the command ends
            super().__init__(
                *self.builds[:2],
                trainer_class=self.builds[2],
                save_config_callback=None,
                seed_everything_default=False,
                auto_configure_optimizers=False,
                parser_class=Parser,
                parser_kwargs={"prog": "svdd"},
                args=[self.command, *with_shipped_configs(words)],
            )

    @contextmanager
    def _other_run_explained(self) -> Iterator[None]:
        """Adds the command that removes the run in the folder, where this one cannot continue it."""
        try:
            yield
        except OtherRun as error:
            way_out = f"Choose another --output, or remove the old run: {overwriting(self._words)}"
            raise RunError(f"{error.what}. {way_out}") from error.__cause__

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Returns the command and the arguments that it hides."""
        return {cls.command: {*cls.hidden}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options, and the defaults."""
        add_options(parser, self.about.options)
        chosen = {f"model.{name}": {"class_path": path} for name, path in self.about.classes.items()}
        parser.set_defaults(chosen | {**self.about.defaults})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Starts or joins the other processes as soon as the Trainer's settings are known."""
        with as_user_errors():
            super().parse_arguments(parser, args)
            self.settings = self.config[self.command]
            self.settings.overwrite = self.settings.overwrite and not restarted()  # the first start did that
            self._check_trainer()
            self._match_precision()
            self._examine_diffusion()
            self.group: Group | None = self._join()

    def _join(self) -> Group | None:
        return join(self.settings.trainer, self.settings.max_restarts, self._words)

    def _examine_diffusion(self) -> None:
        """Refuses a model of another kind by its small files, before anything is written or processes start."""
        if (diffusion := self.settings.model.get("diffusion")) is not None:
            examine = getattr(resolve_name(diffusion.class_path), "examine", None)  # a class has it, a function not
            if examine is not None:
                examine(diffusion.get("init_args") or {})

    def _match_precision(self) -> None:
        """Has the weights read in the precision in which the Trainer computes, unless `dtype` states another."""
        arguments = (self.settings.model.get("diffusion") or {}).get("init_args") or {}
        kind, _, true = str(self.settings.trainer.precision).partition("-")
        if true == "true" and kind in _HALF and arguments.get("dtype") == "auto":
            arguments["dtype"] = _HALF[kind]

    def _check_trainer(self) -> None:
        """Refuses what Lightning would take for a run without pictures, or could not take at all."""
        loop = {"predict": "predict", "fit": "train", "calibrate": "test"}[self.command]
        limit = self.settings.trainer[f"limit_{loop}_batches"]
        if limit is not None and (limit == 0 or (isinstance(limit, float) and limit < 1 and loop != "train")):
            what = f"trainer.limit_{loop}_batches must be a whole number of batches >= 1, got {limit}"
            raise UserError(f"{what}; to use the first prompts only, set data.limit")
        strategy = self.settings.trainer.strategy
        if isinstance(strategy, str) and re.search("spawn|fork|notebook", strategy):
            raise UserError(f"trainer.strategy: {strategy!r} starts processes that do not know this command; use 'ddp'")

    def _parse_ckpt_path(self) -> None:
        """Checks a learned value's file early; `--ckpt_path FILE` selects its value in place of the default one."""
        value, path = self.settings.model.value, self.settings.get("ckpt_path")
        value = value or Namespace(class_path=self.about.classes["value"], init_args=Namespace())
        arguments, made = value.get("init_args", Namespace()), resolve_name(value.class_path)
        if path is None:
            if arguments.get("pretrained") and (not isinstance(made, type) or issubclass(made, LearnedValue)):
                learned_class(arguments.pretrained)  # reads the file
            return
        known = learned_class(path)
        name = known.__name__
        if "pretrained" not in arguments:
            if made is not resolve_name(self.about.classes["value"]):
                found = f"--ckpt_path {path} holds a {name}, but model.value is {made.__name__}, which has no weights"
                raise UserError(f"{found}: give --model.value {name}, or leave out --ckpt_path")
            value = Namespace(class_path=f"{known.__module__}.{name}", init_args=Namespace())
        value.init_args.pretrained, self.settings.model.value = path, value
        self.settings.ckpt_path = None  # Lightning would read settings of the module from it

    def resolved(self) -> dict[str, Any]:
        """Returns the whole configuration of the command as plain values, without secrets; some are a UserError."""
        plain = yaml.safe_load(self._parser(self.command).dump(self.settings, skip_none=False))
        refuse_secrets(plain)
        unrecorded = ("config", "overwrite", "dry_run")  # the run's own configuration would remove it
        return {name: redacted(setting, name) for name, setting in plain.items() if name not in unrecorded}

    def claim(self, prompts: PromptDataset, results: Sequence[str], harmless: re.Pattern[str] = HARMLESS) -> None:
        """Holds the output folder for these settings and prompts until the command ends; called by rank 0.

        Args:
            prompts: Those of the command.
            results: Names of the files that the command writes there. With `overwrite` they are removed, in this order;
                else, if one exists, settings and prompts must equal the recorded ones.
            harmless: The settings that may differ, by default those of `svdd predict`.
        """
        folder, config = self.folder, self.resolved()
        with os_errors_explained(folder):
            self._around.callback(hold(folder, self.command).release)
            recorded = known.config if (known := read_config(folder)) else {}
            for name in results:  # what a killed run had not finished
                (folder / f"{name}.tmp").unlink(missing_ok=True)
            found = [path for path in map(folder.joinpath, results) if path.exists()]
            if self.settings.overwrite:
                for path in found:
                    path.unlink()
            elif found:
                require_same(folder, recorded, config, prompts, harmless, may_grow=False)
            write_config(folder, self.command, config)
            write_prompts(folder, prompts)

    def instantiate_classes(self) -> None:
        """Builds everything; a constructor's complaint about its arguments becomes a `UserError`."""
        with as_user_errors():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; an error because another process has died becomes `Stopped`, a full disk a `RunError`."""
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:  # of Lightning, about the Trainer's settings
            raise UserError(explain(str(error))) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                with os_errors_explained(Path(self.settings.output)):
                    raise
            raise
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and self.group is not None and self.group.is_broken():
                raise Stopped(1) from error
            if (own := own_error(error)) is None:
                raise
            raise own from error
        if self.group is not None:
            self.group.leave()
