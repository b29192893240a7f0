"""Draws the runs of a study: all in this process, or in several that share them."""

import io
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from svdd import Stopped, UserError, first_line, say
from svdd.assets.loaded import keeping_weights
from svdd.commands.cells import attempt, work
from svdd.commands.configs import find_config
from svdd.commands.plans import Cost, Plan
from svdd.commands.progress import duration
from svdd.evaluation.rendering import render
from svdd.evaluation.studies.specification import Cell, Specification, Study, words_of
from svdd.runs.config import write_config
from svdd.runs.files import os_errors_explained
from svdd.runs.output import check, hold
from svdd.runs.processes.devices import environments, gpus, one_device
from svdd.runs.processes.signals import STOP_EXIT_CODES, signals
from svdd.runs.processes.work import Job, Work
from svdd.runs.processes.workers import Workers, environment
from svdd.runs.prompts import keeping_prompts
from svdd.runs.secrets import redact
from svdd.runs.tracebacks import Tracebacks, users_traceback

__all__ = ["Drawing"]

_EVERY = 30.0  # seconds between two lines about the time left
_DRY_RUN = "without start-up and evaluation; nothing was written"


class Drawing:
    """A study and how it is drawn. Use it as a context manager.

    Args:
        name: The study's file, or the name of one that ships with svdd.
        more: Settings of all runs, by dotted keys.
        output: The folder; by default `runs/` and the file's name.
        devices: Processes that draw at once.

    Raises:
        UserError: If the file, the folder or the settings of a run cannot be used.
    """

    def __init__(self, name: str, more: dict[str, Any], output: str | None, devices: int) -> None:
        path = Path(find_config(name, study=True))
        self._specification = Specification.read(path, more)
        self.folder, self._devices = Path(output or f"runs/{path.stem}"), devices
        with os_errors_explained(self.folder):
            check(self.folder, "study")
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._workers: Workers | None = None  # they import while this process plans
        self._around = ExitStack()

    def __enter__(self) -> "Drawing":
        self._gpus = gpus()
        self._around.enter_context(environment(one_device(self._gpus)))
        self._around.enter_context(keeping_prompts())
        return self

    def __exit__(self, *error: object) -> None:
        self._around.close()

    def study(self) -> Study:
        """Returns the runs; a UserError if `svdd predict` refuses the settings of one."""
        plan = self._plan
        return self._specification.study(
            self.folder, lambda words: plan(words).guide, lambda words: plan(words).takes_budget
        )

    def show(self) -> tuple[Study, dict[str, str]]:
        """Prints the runs with what they cost; returns the study, and the errors of runs that are refused."""
        found = self.study()
        failed: dict[str, str] = {}
        tracebacks = Tracebacks()
        table: list[list[str | float | None]] = []
        left: list[float] = []  # hours of each run
        totals = [0, 0.0, 0.0, 0]
        with keeping_weights():
            for cell in found.cells:
                try:
                    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                        cost = Cost(cell.words).found
                except Exception as error:
                    why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                    failed[cell.name] = redact(why)
                    tracebacks.show(users_traceback(error))
                    table.append([cell.name, *[None] * 5, "cannot be drawn"])
                    continue
                entry = [cost.images, cost.denoiser_rows, cost.hours(left=False), cost.disk_bytes]
                totals = [total + number for total, number in zip(totals, entry, strict=True)]
                left.append(cost.hours())
                done = cost.prompts - cost.prompts_left
                note = (
                    "finished" if not cost.prompts_left else f"{done} of {cost.prompts} prompts drawn" if done else ""
                )
                table.append([cell.name, *_numbers(entry), f"{left[-1]:.3g}", note])
        table.append(["all", *_numbers(totals), f"{sum(left):.3g}", ""])
        say(render(["run", "images", "denoiser rows", "hours", "MB", "hours left", ""], table, "text"))
        devices = f", {sum(left) / self._devices:.3g} hours on {self._devices} devices" if self._devices > 1 else ""
        say(f"{sum(left):.3g} hours are left{devices}; hours are measured on this machine, {_DRY_RUN}")
        return found, failed

    def draw(self) -> tuple[Study, dict[str, str]]:
        """Draws what is not finished; returns the study, and the failed runs with their errors.

        Raises:
            Stopped: After a signal.
        """
        with os_errors_explained(self.folder):
            self._around.callback(hold(self.folder, "study").release)
            write_config(self.folder, "study", self._specification.content)
        self._starts = self._devices > 1
        found = self.study()
        failed: dict[str, str] = {}
        jobs: list[Job] = []
        for cell in found.cells:
            plan = self._plan_of(cell)
            try:
                if not plan.is_finished(cell):
                    jobs.append(plan.job(cell))
            except UserError as error:
                failed[cell.name] = str(error)
        work_left = Work(jobs)
        report = _Report(work_left, len(found.cells), len(found.cells) - len(jobs) - len(failed))
        if jobs:
            code = (
                self._draw_here(work_left, report) if self._workers is None else self._workers.serve(work_left, report)
            )
            if code is not None:
                signals.say(f"ended: {STOP_EXIT_CODES[code]}; what is finished is kept, and the same command continues")
                raise Stopped(code)
        left = {job.name: job.message for job in jobs if job.state != "done"}
        return found, failed | {
            name: message.rpartition("\n")[2] or "all processes have died" for name, message in left.items()
        }

    def _draw_here(self, work_left: Work, report: Callable[[str, str], None]) -> int | None:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with keeping_weights(), open(logs / "worker-0.log", "w", encoding="utf-8", errors="backslashreplace") as log:
            while (order := work_left.next(0)) is not None and order.kind != "stop":
                with redirect_stdout(log):
                    message = attempt(order)
                work_left.end(0, order.name, message)
                report("end", order.name)
        return None  # a signal raises `Stopped`

    def _plan_of(self, cell: Cell) -> Plan:
        """Returns the plan of a run, which those of all budgets share."""
        return self._plan(words_of(cell.base, {k: v for k, v in cell.settings.items() if k != "model.budget"}))

    def _plan(self, words: list[str]) -> Plan:
        if (key := tuple(words)) not in self._plans:
            try:
                plan = Plan([*words])
                plan.check_prompts()
                self._plans[key] = plan
            except UserError as error:
                way_out = ""
                if str(error).endswith(": expected list"):
                    way_out = "; a list expands to several runs, so a value that is a list stands in a list: [[A, B]]"
                raise UserError(f"`svdd predict {' '.join(words)}` cannot run: {error}{way_out}") from error
            if self._starts and self._workers is None:
                self._start(str(self._plans[key].settings.trainer.accelerator))
        return self._plans[key]

    def _start(self, accelerator: str) -> None:
        """Starts the other processes."""
        variables = environments(self._devices, [] if accelerator == "cpu" else self._gpus)
        self._workers = Workers(variables, work, self.folder / "logs")
        self._around.callback(self._workers.close)

    _starts = False


def _numbers(entry: Sequence[float]) -> list[str]:
    """Returns images, rows, hours and bytes as text, the last in MB."""
    images, rows, hours, size = entry
    return [f"{images:,}", f"{rows:,.0f}", f"{hours:.3g}", f"{size / 1e6:.3g}"]


class _Report:
    """Prints a line for each run that ends, and now and then one with the time left."""

    def __init__(self, work_left: Work, total: int, done: int) -> None:
        self._work, self._total, self._done = work_left, total, done
        self._ended: set[str] = set()
        self._tracebacks = Tracebacks()
        self._begin = self._said = time.monotonic()
        say(f"{total} runs, {done} of them finished")

    def __call__(self, kind: str, name: str) -> None:
        job = self._work.jobs[name]
        ended = job.state in ("done", "failed") and name not in self._ended  # processes that helped leave it later
        if kind == "lost":
            say(f"svdd: a process that drew {name} has died; the others go on", error=True)
        if ended:
            self._ended.add(name)
            traceback, _, message = job.message.rpartition("\n")
            self._tracebacks.show(traceback)
            words = f"failed: {message}" if job.state == "failed" else "done"
            count = f"[{self._done + len(self._ended)}/{self._total}]"
            say(f"{count} {name}: {words}{self._time_left()}", error=job.state == "failed")
        elif kind == "batch" and time.monotonic() - self._said > _EVERY:
            drawing = ", ".join(job.name for job in self._work.jobs.values() if job.state == "drawing")
            share = self._work.drawn / (self._work.drawn + self._work.left)
            say(f"svdd: {share:.0%} of the rows{self._time_left()}; now {drawing}", error=True)

    def _time_left(self) -> str:
        """Returns the time that the other rows take, at the rate of those that are drawn."""
        self._said = time.monotonic()
        if not self._work.drawn or not self._work.left:
            return ""
        return f", {duration((self._said - self._begin) * self._work.left / self._work.drawn)} left"
