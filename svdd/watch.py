"""Ends a run in order: on a signal, and when one of its processes fails, is killed or does not answer."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import lightning as L

from svdd.errors import Stopped
from svdd.peers import DONE, FAILED, RUNNING, STOPPING, Peers

__all__ = ["Watch"]

_LEADER = "SVDD_LEADER"  # the process that starts the others of its machine, for them to know
_START, _LOOP, _END = range(3)


class _Stop(NamedTuple):
    """Why the run ends: the exit code, and when this process ends at the latest even inside a batch."""

    reason: str
    code: int
    deadline: float | None


class Watch(L.Callback):
    """Watches over the processes of a run, from before the model is built until the last one has ended.

    - SIGTERM: every process finishes the batch that it is drawing, and the run exits with 143. So does SIGINT, with
      130; a second SIGINT ends it at once. Before the first batch and on a second SIGINT there is nothing to finish.
    - A process that fails, is killed or shows no sign of life ends the run: the others finish their batch if that
      takes no longer than `patience`, say why, and exit with 1.
    - A process whose parent has gone ends itself, so that none is left behind.

    Use it as a context manager around everything, and as the Trainer's last callback.

    Args:
        folder: The run folder.
        patience: Seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, folder: str | Path, patience: float = 25.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be > 0 seconds, got {patience}")
        self.folder, self.patience = Path(folder), patience
        self._phase, self._state = _START, RUNNING
        self._stop: _Stop | None = None
        self._peers: Peers | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._parent: int | None = None  # None where nobody minds who started this process
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}
        self._rank = 0

    # ---- the frame around the run

    def __enter__(self) -> "Watch":
        """Listens to signals, and to the parent where this process is one of several that it started."""
        self._listen()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._parent = os.getppid()
        elif "LOCAL_RANK" in os.environ and _LEADER in os.environ:
            self._parent = int(os.environ[_LEADER])
        else:
            os.environ[_LEADER] = str(os.getpid())
        if self._parent is not None:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the processes that this one started, and leaves signals as they were."""
        if error is not None and self._stop is None:
            self._over.set()  # this error is the reason, and is yet to be printed
        self._reap()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._peers is not None and error is None:
            self._peers.leave()
        if self._parent is None:
            os.environ.pop(_LEADER, None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # ---- the Trainer's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the started processes over from Lightning, which would kill this one in the middle of a batch."""
        self._rank = trainer.global_rank
        processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        self._children += processes
        processes.clear()
        if trainer.world_size > 1:
            self._peers = Peers(self.folder, trainer.global_rank, trainer.world_size, self.patience)
            self._start()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal waits for the batch."""
        self._listen()  # Lightning has put its own handler before ours, which waits for other processes
        self._phase = _LOOP

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ends the run where that was asked for; the batch is on disk by now.

        Raises:
            Stopped: If a signal or a failure elsewhere ends the run.
        """
        self._obey()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits until all processes are through, however long, in a way that a signal or a failure can end.

        Raises:
            Stopped: If a signal or a failure elsewhere ends the run.
        """
        if self._peers is not None:
            self._state = DONE
            self._peers.say(DONE)
            while self._peers.ranks(RUNNING, STOPPING, FAILED):
                self._obey()
                time.sleep(0.05)
        self._phase = _END

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the other processes."""
        self._state = STOPPING if self._stop is not None and self._stop.deadline is None else FAILED
        if self._peers is not None:
            self._peers.say(self._state)

    # ---- signals

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._on_signal)
                if number not in self._handlers:
                    self._handlers[number] = previous

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        first = self._stop is None
        self._ask(name, 128 + number, None)
        if self._phase == _START:
            raise Stopped(128 + number)
        if number == signal.SIGINT and not first and self._children_are_mine():
            self._die(f"{name} again: ended at once", 128 + number)
        if first and self._phase == _LOOP and self._rank == 0:
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            print(f"svdd: {name}: the batch at work is finished first{again}", file=sys.stderr, flush=True)

    def _children_are_mine(self) -> bool:
        """Whether no other svdd process looks after this one."""
        return self._parent is None or "TORCHELASTIC_RUN_ID" in os.environ

    def _ask(self, reason: str, code: int, deadline: float | None) -> None:
        """Asks this process to end after its batch; a failure is more urgent than a signal."""
        if self._stop is None or (self._stop.deadline is None and deadline is not None):
            self._stop = _Stop(reason, self._stop.code if self._stop else code, deadline)

    def _obey(self) -> None:
        if self._stop is None:
            return
        if self._stop.deadline is not None or self._rank == 0:
            print(f"svdd: ended: {self._stop.reason}; {_KEPT}", file=sys.stderr, flush=True)
        raise Stopped(self._stop.code)

    # ---- the thread

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="svdd-watch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            if self._parent is not None and os.getppid() != self._parent:
                self._die("the process that started this one is gone", 1)
            self._check_children()
            self._check_peers()
            stop = self._stop
            if stop and stop.deadline and (self._phase != _LOOP or time.monotonic() > stop.deadline):
                self._die(stop.reason, stop.code)
            if self._over.wait(min(1.0, self.patience / 10)):
                return

    def _check_children(self) -> None:
        for number, child in enumerate(self._children, 1):
            code = child.poll()
            if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                self._ask(f"process {number} was told to end", 128 + signal.SIGTERM, None)
            elif code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                self._ask(f"process {number} of this machine {how}", 1, time.monotonic() + self.patience)

    def _check_peers(self) -> None:
        if self._peers is None:
            return
        self._peers.say(self._state)
        self._peers.look()
        limit = time.monotonic() + self.patience
        for rank in self._peers.ranks(STOPPING):
            self._ask(f"process {rank} was told to end", 128 + signal.SIGTERM, None)
        for rank in self._peers.ranks(FAILED):
            self._ask(f"process {rank} failed, see its message", 1, limit)
        for rank in self._peers.lost():
            silence = f"no sign of life for {self.patience:.0f} s (stopped, or its machine is down)"
            self._ask(f"process {rank} has given {silence}", 1, limit)

    # ---- the end

    def _reap(self) -> None:
        """Waits for the started processes: without limit while they finish a batch on a signal, else not for long."""
        limit = time.monotonic() + self.patience
        waits = self._phase == _LOOP and self._stop is not None and self._stop.deadline is None
        while any(child.poll() is None for child in self._children):
            if self._phase == _START or (time.monotonic() > limit and not waits):
                self._kill_children()
            time.sleep(0.05)

    def _kill_children(self) -> None:
        for child in self._children:
            with suppress(OSError):
                child.kill()

    def _die(self, reason: str, code: int) -> None:
        """Ends this process where it stands, even inside a collective that nobody will answer."""
        self._state = FAILED
        if self._peers is not None:
            self._peers.say(FAILED)
        print(f"svdd: ended: {reason}; {_KEPT}", file=sys.stderr, flush=True)
        self._kill_children()
        os._exit(code)


_KEPT = "finished images are kept, and the same command continues"
