"""Which worker draws which run, and which batches of it: the state that the parent of several workers keeps.

A run belongs to one worker, which claims the folder and writes its summary. When no run is free, idle workers take
batches of the runs that others draw. A batch that a worker has lost is handed out again.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Job", "Order", "Work"]

_MOST_DEATHS = 2  # of the processes that draw a run; then the run is the cause


class Order(NamedTuple):
    """What a worker is told to do: `draw` or `assist` a job, or `stop`."""

    kind: str
    name: str = ""
    words: Sequence[str] = ()


@dataclass
class Job:
    """A run that is to be drawn.

    Args:
        name: Its unique name.
        words: The command line of `svdd predict`, after the command's name.
        rows: Expected denoiser rows; the longest job is drawn first.
        model: Jobs with the same model are drawn one after another, as their weights are loaded once.
    """

    name: str
    words: Sequence[str]
    rows: float = 1.0
    model: Hashable = None
    state: str = "waiting"  # then `drawing`, and at the end `done` or `failed`
    message: str = ""  # why it failed
    owner: int | None = None
    left: deque[list[int]] = field(default_factory=deque)  # batches of prompts that are not handed out
    out: dict[int, list[int]] = field(default_factory=dict)  # a batch that a worker draws
    helpers: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)  # workers that have failed to help
    results: list[Any] = field(default_factory=list)  # result rows of the helpers
    rows_per_prompt: float = 0.0
    prompts_left: int | None = None  # None: not known yet
    deaths: int = 0
    again: bool = False  # whether a helper died and may have left half-written files

    @property
    def rows_left(self) -> float:
        """Denoiser rows that are not drawn yet."""
        if self.state in ("done", "failed"):
            return 0.0
        return self.rows if self.prompts_left is None else self.prompts_left * self.rows_per_prompt


class Work:
    """All jobs, the longest first. A method that returns None has no answer yet: ask again after the next event."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.name: job for job in sorted(jobs, key=lambda job: -job.rows)}
        self.models: dict[int, Hashable] = {}  # of each worker's last job
        self.stopping = False
        self.drawn = 0.0  # denoiser rows

    @property
    def left(self) -> float:
        """Denoiser rows that are not drawn yet."""
        return sum(job.rows_left for job in self.jobs.values())

    def next(self, worker: int) -> Order | None:
        """Returns what an idle worker does next."""
        if self.stopping or all(job.state in ("done", "failed") for job in self.jobs.values()):
            return Order("stop")
        free = [job for job in self.jobs.values() if job.state == "waiting" and not job.helpers]
        if free:
            job = next((job for job in free if job.model == self.models.get(worker, job.model)), free[0])
            job.state, job.owner, self.models[worker] = "drawing", worker, job.model
            return Order("draw", job.name, job.words)
        held = [job for job in self.jobs.values() if job.state == "drawing" and job.left and not job.deaths]
        held = [job for job in held if worker not in job.refused]
        if held:
            job = max(held, key=lambda job: len(job.left) * job.rows_per_prompt / (len(job.helpers) + 1))
            job.helpers.add(worker)
            self.models[worker] = job.model
            return Order("assist", job.name, job.words)
        return None

    def begin(self, name: str, batches: list[list[int]], rows_per_prompt: float) -> None:
        """Notes the batches of a job that its owner is ready to draw."""
        job = self.jobs[name]
        job.left, job.rows_per_prompt = deque(batches), rows_per_prompt
        job.prompts_left = sum(map(len, batches))

    def take(self, worker: int, name: str, results: Sequence[Any]) -> tuple[list[int], list[Any] | None] | None:
        """Returns the next batch of a job, [] at its end, with the result rows of all helpers for the owner.

        The worker's last batch is finished; `results` are its rows. The owner waits for the helpers' last batches. If
        the work stops, both get None in place of rows.
        """
        job = self.jobs[name]
        if (finished := job.out.pop(worker, None)) is not None:
            self._count(job, finished)
            if worker != job.owner:
                job.results += results
        if self.stopping:
            return [], None
        if worker != job.owner and job.owner is None:
            return [], []
        if job.left:
            job.out[worker] = job.left.popleft()
            return job.out[worker], []
        if worker == job.owner and job.out:
            return None
        return [], job.results if worker == job.owner else []

    def end(self, worker: int, name: str, message: str = "") -> None:
        """Notes that a worker has left a job; with a message the job, or its own last batch, has failed."""
        job = self.jobs[name]
        if worker == job.owner and not message and worker in job.out:  # which asked for no batch beyond all of them
            self._count(job, job.out.pop(worker))
        self._return(worker, job)
        if worker != job.owner:
            job.helpers.discard(worker)
            job.refused |= {worker} if message else set()
            return
        job.owner, job.results = None, []
        if message:
            job.state, job.message = "failed", message
        elif job.again:
            job.state, job.again = "waiting", False
        else:
            self.drawn += job.rows_left if job.prompts_left is None else 0.0
            job.state = "done"

    def lose(self, worker: int) -> list[str]:
        """Returns the names of the jobs on which a worker that has died was working."""
        lost = [job for job in self.jobs.values() if worker == job.owner or worker in job.helpers]
        for job in lost:
            self._return(worker, job)
            job.helpers.discard(worker)
            job.deaths, job.again = job.deaths + 1, True
            if worker == job.owner:
                job.owner, job.results, job.left, job.again = None, [], deque(), False
                job.state = "waiting"
                if job.deaths >= _MOST_DEATHS:
                    job.state, job.message = "failed", f"{job.deaths} processes that drew it have died"
        return [job.name for job in lost]

    def _count(self, job: Job, batch: list[int]) -> None:
        """Counts a finished batch."""
        job.prompts_left = (job.prompts_left or 0) - len(batch)
        self.drawn += len(batch) * job.rows_per_prompt

    def _return(self, worker: int, job: Job) -> None:
        """Hands the batch of a worker that has not finished it to the others."""
        if (batch := job.out.pop(worker, None)) is not None:
            job.left.appendleft(batch)
