"""Threads for work beside the device; they never keep the process alive, and each user makes its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import torch

__all__ = ["Pool"]

Job = tuple[Future[Any], Callable[[], Any]]


class Pool:
    """At most so many threads, which start when there is work and end when the pool is closed or collected.

    Unlike those of `concurrent.futures`, they are daemons: an interrupted process does not wait for a slow server. They
    use as many threads of PyTorch as the thread that submits, one in the reproducible mode.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._started, self._lock = threads, 0, threading.Lock()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs the function in one of the threads, in the order of submission."""
        future: Future[Any] = Future()
        self._jobs.put((future, function))
        with self._lock:
            begin = self._started < self._threads
            self._started += begin
        if begin:
            ready = threading.Event()
            threading.Thread(target=_work, args=(self._jobs, ready), name="svdd pool", daemon=True).start()
            ready.wait()
        return future

    def close(self) -> None:
        """Lets the threads end once all submitted work is done."""
        with self._lock:
            ending, self._started = self._started, 0
        for _ in range(ending):
            self._jobs.put(None)

    def cancel(self) -> None:
        """Drops the work that has not begun, and lets the threads end."""
        ends = 0  # of threads, which an earlier `close` has asked for
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job is None:
                ends += 1
            else:
                job[0].cancel()
        for _ in range(ends):
            self._jobs.put(None)
        self.close()

    def __del__(self) -> None:
        """Ends the threads."""
        self.close()


def _work(jobs: "SimpleQueue[Job | None]", ready: threading.Event) -> None:
    torch.get_num_threads()  # takes over the number that is set now
    ready.set()
    while (job := jobs.get()) is not None:
        future, function = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        del job, future, function
