"""What is known about the runs of a study before they are drawn: their settings, their length, what is finished."""

import json
from contextlib import ExitStack
from functools import cache
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from svdd import SUMMARY_FILE
from svdd.commands.cells import CellCLI
from svdd.commands.estimate import Estimate
from svdd.commands.parser import Parser, as_user_errors
from svdd.commands.predict import PredictCLI
from svdd.evaluation.studies.specification import Cell
from svdd.rewards.base import Reward
from svdd.rewards.columns import columns_of
from svdd.runs.config import read_config
from svdd.runs.files import read_object
from svdd.runs.processes.work import Job
from svdd.runs.prompts import PromptDataModule

__all__ = ["Cost", "Plan"]

_LIGHT = {"num_inference_steps", "guidance_scale", "eta", "scheduler", "scheduler_options", "noise", "rho"}
_LIGHT |= {"inner_steps", "negative_prompt", "height", "width", "chunk_size", "reproducible"}  # not about the weights
_STEPS = 50  # where the model's own default holds


class Plan(CellCLI):
    """The checked settings of a run, of which nothing is built; UserError if `svdd predict` refuses them."""

    def before_instantiate_classes(self) -> None:
        """Nothing is written."""

    instantiate_classes = before_instantiate_classes

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is drawn."""

    @property
    def guide(self) -> str:
        """The name of the class of the guide reward, or of its function."""
        reward = self.settings.model.reward
        return str(reward.get("init_args", {}).get("function") or reward.class_path).rpartition(".")[2]

    @property
    def takes_budget(self) -> bool:
        """Whether a budget can set a count of the sampler."""
        made = resolve_name(self._part("sampler").class_path)
        return getattr(made, "budget_argument", None) is not None

    def images(self) -> int:
        """Returns the number of images of the run."""
        return _num_prompts(json.dumps(self.settings.data.as_dict())) * int(self.settings.model.images_per_prompt)

    def check_prompts(self) -> None:
        """Raises UserError if a prompt lacks a column that a reward needs."""
        model = self.settings.model
        for reward in (model.reward, *(model.eval_rewards or ())):
            _check_columns(json.dumps(self.settings.data.as_dict()), json.dumps(reward.as_dict(), default=str))

    def job(self, cell: Cell) -> Job:
        """Returns the work of a cell with these settings; its rows are a guess."""
        diffusion, sampler = self._part("diffusion"), self._part("sampler")
        arguments = dict(diffusion.get("init_args") or {})
        given = (sampler.get("init_args") or {}).values() if self.takes_budget else ()
        count = max((number for number in given if type(number) is int), default=1)
        each = cell.budget or count * int(arguments.get("num_inference_steps") or _STEPS)
        heavy = {name: value for name, value in arguments.items() if name not in _LIGHT}
        weights = json.dumps([diffusion.class_path, self.settings.trainer.precision, heavy], default=str)
        return Job(cell.name, cell.words, float(each * self.images()), weights)

    def _part(self, name: str) -> Any:
        """Returns the settings of a part of the model; without any, those of its default class."""
        return self.settings.model[name] or Namespace(class_path=self.about.classes[name])

    def is_finished(self, cell: Cell) -> bool:
        """Whether the run of a cell with these settings is complete; a RunError if its folder cannot be used."""
        if not (cell.folder / SUMMARY_FILE).is_file():
            return False
        self.settings.output = str(cell.folder)
        if "model.budget" in cell.settings:
            self.settings.model.budget = cell.budget
        self.settings.dry_run = True
        with ExitStack() as self._around:
            PredictCLI.before_instantiate_classes(self)
            prompts = len(self.prompts.dataset)
        summary, recorded = read_object(cell.folder / SUMMARY_FILE), read_config(cell.folder)
        measured = recorded is not None and recorded.config.get("evaluation") == self.resolved()["evaluation"]
        return measured and len(self.finished) == prompts == summary.get("prompts")


@cache
def _num_prompts(data: str) -> int:
    """Returns the number of prompts that the settings of the data, as JSON, choose."""
    with as_user_errors():
        prompts = PromptDataModule(**json.loads(data))
        try:
            return len(prompts.dataset)
        finally:
            prompts.teardown()


@cache
def _check_columns(data: str, reward: str) -> None:
    """Raises UserError if a prompt lacks a column that a reward needs; both are settings as JSON."""
    parser = Parser()
    parser.add_argument("--reward", type=Reward)
    try:
        made = parser.instantiate_classes(parser.parse_object({"reward": json.loads(reward)})).reward
    except (Exception, SystemExit):
        return  # the run says what is wrong
    if (columns := columns_of(made)).needed or columns.paths or columns.checks:
        prompts = PromptDataModule(**json.loads(data))
        try:
            columns.check(prompts.dataset, prompts.dataset.place)
        finally:
            prompts.teardown()


class Cost(CellCLI):
    """Measures what a run costs; writes nothing."""

    found: Estimate

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Makes it a dry run."""
        super().parse_arguments(parser, args)
        self.settings.dry_run = True

    def _run_subcommand(self, subcommand: str) -> None:
        self.found, _, _ = self.estimated()
