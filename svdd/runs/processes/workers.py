"""Worker processes on one machine that draw the runs of a `Work`, each on its own device."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from svdd import Stopped
from svdd.runs.processes.signals import die_with_parent, signals
from svdd.runs.processes.work import Work

__all__ = ["Link", "Workers", "environment"]

_POLL = 0.5  # seconds between looks at signals


class Link:
    """A worker's connection to its parent."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def tell(self, *message: Any) -> None:
        """Sends a message that has no answer."""
        with suppress(OSError):  # the parent has died: the next question notices
            self._connection.send(message)

    def ask(self, *message: Any, waiting: Callable[[], None] = lambda: None) -> Any:
        """Sends a message and returns the answer; calls `waiting` now and then until it comes.

        Raises:
            Stopped: If the parent has died.
        """
        try:
            self._connection.send(message)
            while not self._connection.poll(_POLL):
                waiting()
            return self._connection.recv()
        except (OSError, EOFError):
            raise Stopped(1) from None


class Workers:
    """Starts one process for each entry of `environments`, which are added to its environment variables.

    Args:
        environments: For each worker.
        work: A function of a module that a new process can import; it is called with a `Link` and the worker's number.
        logs: A folder that takes what the workers print.
    """

    def __init__(
        self, environments: Sequence[Mapping[str, str]], work: Callable[[Link, int], None], logs: Path
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._links: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        for number, variables in enumerate(environments):
            ours, theirs = context.Pipe()
            log = str(logs / f"worker-{number}.log")
            process = context.Process(target=_serve, args=(theirs, number, log, work), daemon=True)
            with environment(variables):
                process.start()
            theirs.close()
            self._links[number], self._processes[number] = ours, process

    def serve(self, work: Work, on_event: Callable[[str, str], None]) -> int | None:
        """Answers the workers until all jobs are done; returns the exit code if a signal has ended the work.

        Args:
            work: The jobs.
            on_event: Is called with `batch`, `end` or `lost`, and the name of the job.
        """
        signals.deferred, signals.unit = True, "batch of each process"
        try:
            return self._serve(work, on_event)
        finally:
            signals.deferred = False

    def _serve(self, work: Work, on_event: Callable[[str, str], None]) -> int | None:
        asking: dict[int, tuple[Any, ...]] = {}
        told = False
        while self._links:
            if signals.exit_code is not None and not told:
                told = work.stopping = True
                for process in self._processes.values():
                    with suppress(OSError):
                        os.kill(process.pid, signal.SIGTERM)
            for number, message in list(asking.items()):
                answer = work.next(number) if message[0] == "next" else work.take(number, *message[1:])
                if answer is None:
                    continue
                del asking[number]
                with suppress(OSError):  # it has died, which the next look notices
                    self._links[number].send(answer)
                if message[0] == "take":
                    on_event("batch", message[1])
            numbers = {link: number for number, link in self._links.items()}
            link: Any
            for link in wait(list(numbers), _POLL):
                number = numbers[link]
                try:
                    message = link.recv()
                except (OSError, EOFError):
                    self._remove(number)
                    asking.pop(number, None)
                    for name in work.lose(number):
                        on_event("lost", name)
                    continue
                if message[0] in ("next", "take"):
                    asking[number] = message
                elif message[0] == "begin":
                    work.begin(*message[1:])
                else:
                    work.end(number, *message[1:])
                    on_event("end", message[1])
        return signals.exit_code

    def close(self) -> None:
        """Ends all processes that still run."""
        for number in list(self._links):
            self._processes[number].terminate()
            self._remove(number)

    def _remove(self, number: int) -> None:
        self._links.pop(number).close()
        self._processes[number].join()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Any, number: int, log: str, work: Callable[[Link, int], None]) -> None:
    """Runs in a worker: sends its output to the log, listens to signals, and works."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    die_with_parent()
    signals.listen()
    work(Link(connection), number)
