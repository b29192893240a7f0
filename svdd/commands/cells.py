"""The runs of a study: `svdd predict`, several times in one process, and in several processes at once."""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L

from svdd import Incomplete, Stopped, UserError, first_line, say
from svdd.assets.loaded import keeping_weights, next_run
from svdd.commands.parser import as_user_errors
from svdd.commands.predict import PredictCLI
from svdd.commands.streams import exits_explained
from svdd.rewards.base import is_device_failure
from svdd.runs.assistant import AssistantWriter
from svdd.runs.processes.signals import signals
from svdd.runs.processes.stop import StopOnSignal
from svdd.runs.processes.watchdog import StepTimeout
from svdd.runs.processes.work import Order
from svdd.runs.processes.workers import Link
from svdd.runs.prompts import PromptDataModule, keeping_prompts
from svdd.runs.secrets import redact
from svdd.runs.tracebacks import users_traceback
from svdd.samplers.budget import Uncountable, count

__all__ = ["CellCLI", "attempt", "work"]

_STUDYS_OWN = {
    "dry_run": "give `svdd study --dry_run true`",
    "overwrite": "remove the folders of runs that are to be drawn again",
}


class CellCLI(PredictCLI):
    """Makes one run in this process, on its only device."""

    def __init__(self, words: Sequence[str], label: str | None = None) -> None:
        self.label = label
        super().__init__([*words])

    def _check_trainer(self) -> None:
        super()._check_trainer()
        trainer = self.settings.trainer
        if str(trainer.devices) not in ("auto", "1", "-1") or trainer.num_nodes != 1:
            found = f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes}"
            raise UserError(f"a study spreads its runs itself, got {found}: leave them out and give --devices")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Lets the run share the weights of earlier ones that computed in the same way."""
        super().parse_arguments(parser, args)
        for name, way_out in _STUDYS_OWN.items():
            if self.settings[name]:
                raise UserError(f"{name} is true in a configuration; remove it there, and {way_out}")
        trainer = self.settings.trainer
        next_run(repr([trainer[name] for name in ("accelerator", "precision", "plugins", "strategy")]))


class _OwnerCLI(CellCLI):
    """Makes a run and leaves some of its batches to other processes."""

    def __init__(self, words: Sequence[str], name: str, link: Link) -> None:
        self._name, self._link = name, link
        self._others: list[Any] = []  # result rows of the other processes
        super().__init__(words, "")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the callback that talks to the other processes, before the last, which ends the run on a signal."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(len(trainer.callbacks) - 1, _Sharing(self))
        return trainer

    def before_predict(self) -> None:
        """Has the batches handed out by the parent."""
        super().before_predict()
        self.datamodule.hand = self._take

    def begin(self) -> None:
        """Tells the parent which prompts are left."""
        left, size = self.datamodule.unfinished, self.datamodule.batch_size
        batches = [left[start : start + size] for start in range(0, len(left), size)]
        self._link.tell("begin", self._name, batches, rows_of(self.model) * self.model.images_per_prompt)

    def add_others(self) -> None:
        """Adds what other processes have drawn to the statistics."""
        self.model.record(self._others)

    def _take(self) -> list[int]:
        batch, others = self._link.ask("take", self._name, [], waiting=self.watchdog.progress)
        if others is None:
            raise Stopped(signals.exit_code or 143)
        self._others += others
        return batch


class _Sharing(L.Callback):
    """Offers the batches of a run to other processes."""

    def __init__(self, run: _OwnerCLI) -> None:
        self._run = run

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The writer is ready, in this process and for others."""
        self._run.begin()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All processes are through."""
        self._run.add_others()


class _AssistantCLI(CellCLI):
    """Draws batches of a run that another process holds."""

    def __init__(self, words: Sequence[str], name: str, link: Link, rank: int) -> None:
        self._name, self._link, self._rank = name, link, rank
        self._drawn: list[Any] = []  # result rows of the last batch
        self._count = 0
        super().__init__(words)

    def before_instantiate_classes(self) -> None:
        """Reads the prompts; their owner has checked them."""
        with as_user_errors():
            self.stop, self.watchdog = StopOnSignal(), StepTimeout(self.settings.step_timeout)
            self.prompts = PromptDataModule(**self.settings.data.as_dict())
            self._around.callback(self.prompts.teardown)
            output, tar, prompts = self.settings.output, self.settings.tar, self.prompts.dataset
            self.writer = AssistantWriter(output, self._rank, prompts, tar, self._drawn)
        self._around.callback(self.writer.close)

    def before_predict(self) -> None:
        """Has the batches handed out by the parent."""
        self.datamodule.adopt(self.prompts)
        self.datamodule.hand = self._take

    def after_predict(self) -> None:
        """Prints what it has drawn; the summary is the owner's."""
        say(f"{self._count} images of {self._name} for the process that holds it")

    def _take(self) -> list[int]:
        self.writer.flush()  # a batch that is not on disk is not finished: its owner would not draw it again
        batch, others = self._link.ask("take", self._name, list(self._drawn), waiting=self.watchdog.progress)
        if others is None:
            raise Stopped(signals.exit_code or 143)
        self._count += len(self._drawn)
        self._drawn.clear()
        return batch


def rows_of(model: Any) -> float:
    """Returns the denoiser rows of an image, by which runs are compared in length; T if they cannot be counted."""
    try:
        return count(model.sampler, model.diffusion, model.value).rows
    except Uncountable:
        return float(model.diffusion.num_inference_steps)


def attempt(order: Order, link: Link | None = None, number: int = 0) -> str:
    """Carries out an order in this process; returns why it failed in one line, after a traceback, or an empty text.

    Raises:
        Stopped: After a signal.
        Exception: If the device has failed, so that nothing more can be drawn in this process.
    """
    try:
        with warnings.catch_warnings(), exits_explained():
            if link is None:
                CellCLI(order.words, f"{order.name}: " if sys.stderr.isatty() else None)
            elif order.kind == "draw":
                _OwnerCLI(order.words, order.name, link)
            else:
                _AssistantCLI(order.words, order.name, link, number + 1)
        return ""
    except Stopped:
        raise
    except Incomplete:
        return "some prompts could not be drawn; its folder holds their list"
    except SystemExit as error:
        return f"ended with {error.code}"
    except UserError as error:
        return f"{users_traceback(error)}\n{redact(' '.join(str(error).splitlines()))}".removeprefix("\n")
    except Exception as error:
        if is_device_failure(error) and "memory" not in repr(error).lower():
            raise
        say(redact(traceback.format_exc()))
        return f"{type(error).__name__}: {redact(first_line(error))}"
    finally:
        gc.collect()  # a Trainer and its callbacks refer to each other


def work(link: Link, number: int) -> None:
    """Draws in a worker what its parent orders, until there is nothing left."""
    sys.path.append(os.getcwd())  # class paths name files there
    with keeping_weights(), keeping_prompts():
        while (order := link.ask("next")).kind != "stop":
            link.tell("end", order.name, attempt(order, link, number))
