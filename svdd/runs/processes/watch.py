"""Ends a run in order: on a signal, and when one of its processes fails, is killed or does not answer."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import lightning as L

from svdd import Stopped
from svdd.runs.processes.children import TOLD, Children
from svdd.runs.processes.peers import DONE, FAILED, LEADER, RUNNING, STOPPING, Launch, Peers, led
from svdd.runs.processes.signal_pipe import Bell

__all__ = ["Watch"]

_START, _LOOP, _END, _AFTER = range(4)  # before the first batch, until the last, until the summary, then
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SLOW_START = 10  # times the patience: imports and weights come from disks that others read too
_DEAF = 3.0  # seconds in which a signal must get through where nothing is to be finished
_KEPT = "finished images are kept, and the same command continues"


class _Stop(NamedTuple):
    """Why the run ends, since when, and when this process ends at the latest even inside a batch."""

    reason: str
    code: int
    since: float
    deadline: float | None


class Watch(L.Callback):
    """Watches over the processes of a run, from before the model is built until the last one has ended.

    - SIGTERM: every process finishes the batch that it is drawing, and the run exits with 143. So does SIGINT, with
      130; a second SIGINT ends it at once. Before the first batch, after the summary and on a second SIGINT there is
      nothing to finish.
    - A process that fails, is killed or shows no sign of life ends the run: the others finish their batch if that
      takes no longer than `patience`, say why, and exit with 1.
    - A process whose parent has gone ends itself, so that none is left behind.

    Use it as a context manager around everything, and as the Trainer's last callback.

    Args:
        folder: The run folder.
        patience: Seconds without a sign of life after which a process counts as lost, and as many again for the
            others to finish their batch. Until all processes have met, ten times as many.
    """

    def __init__(self, folder: str | Path, patience: float = 25.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be > 0 seconds, got {patience}")
        self.folder, self.patience = Path(folder), patience
        self._phase, self._state = _START, RUNNING
        self._stop: _Stop | None = None
        self._launch: Launch | None = None
        self._peers: Peers | None = None
        self._speech = threading.RLock()  # the state, and what the others hear of it, change together
        self._children = Children()
        self._parent: int | None = None  # None where nobody minds who started this process
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}
        self._bell: Bell | None = None
        self._rung: tuple[int, float] | None = None  # the first signal, and when it came
        self._rank = 0

    # ---- the frame around the run

    def __enter__(self) -> "Watch":
        """Listens to signals, and to the parent where this process is one of several that it started."""
        if threading.current_thread() is threading.main_thread():
            self._bell = Bell()
        self._listen()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._parent = os.getppid()
        elif "LOCAL_RANK" in os.environ and LEADER in os.environ:
            self._parent = int(os.environ[LEADER])
        else:
            os.environ[LEADER] = str(os.getpid())
        self._thread = threading.Thread(target=self._run, name="svdd-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the processes that this one started, and leaves signals as they were.

        Raises:
            Stopped: In place of an error that only says that the others have ended on a signal.
        """
        try:
            excused = self._excuse(error)
            if error is None or self._phase == _AFTER:
                self._phase = _AFTER
                self._join()  # what the others do from here on is no reason to end
            elif self._stop is None:
                self._over.set()  # this error is the reason, and is yet to be printed
            self._reap()
        finally:
            self._children.kill()
            self._join()
            self._say_last()
            self._hang_up()
        if excused is not None:
            raise excused from error

    def meet(self, launch: Launch | None) -> None:
        """Begins to exchange signs of life with the processes that were started together with this one.

        Args:
            launch: Those processes; None where there are none, or nobody knows them yet.
        """
        if launch is not None and launch.world_size > 1:
            with self._speech:
                self._launch, self._rank = launch, launch.rank
                self._peers = Peers(self.folder, launch, self.patience * _SLOW_START)

    def forget(self) -> None:
        """Removes what the processes of earlier runs have left in the folder; for rank 0, once it is its own."""
        Peers.forget(self.folder, self._launch)

    def attend(self, trainer: L.Trainer) -> None:
        """Watches over the processes that the Trainer starts, from the first moment."""
        self._children.follow(trainer)
        if self._launch is None and trainer.num_nodes == 1 and self._parent is None:
            self.meet(led(trainer.global_rank, trainer.world_size, os.getpid()))

    # ---- the Trainer's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the started processes over from Lightning, which would kill this one in the middle of a batch."""
        self._rank = trainer.global_rank
        self._children.take(trainer)
        if trainer.world_size > 1:  # all are there: from here on patience is what it says
            launch = self._launch or led(trainer.global_rank, trainer.world_size)
            with self._speech:
                self._peers = Peers(self.folder, launch, self.patience, met=True)

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
            self._say(DONE)
            while self._peers.ranks(RUNNING, STOPPING, FAILED):
                self._obey()
                time.sleep(0.05)
        self._phase = _END

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal ends the run at once: the summary is on disk.

        Raises:
            Stopped: If there has been one since the last batch.
        """
        self._phase = _AFTER
        self._obey()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Does the same where no prompt was left to draw."""
        self._phase = _AFTER

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the other processes."""
        self._excuse(exception)
        if self._phase != _AFTER:
            self._say(self._last_word())

    # ---- signals

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.signal(number, self._on_signal)
                if number not in self._handlers:
                    self._handlers[number] = previous

    def _hang_up(self) -> None:
        """Leaves signals, and the environment, as they were."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        if self._parent is None:
            os.environ.pop(LEADER, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        first = self._stop is None
        self._ask(name, 128 + number, None)
        if self._phase in (_START, _AFTER):
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
        if self._stop is None:
            self._stop = _Stop(reason, code, time.monotonic(), deadline)
        elif self._stop.deadline is None and deadline is not None:
            self._stop = self._stop._replace(reason=reason, deadline=deadline)

    def _obey(self) -> None:
        if self._stop is None:
            return
        if self._stop.deadline is not None or self._rank == 0:
            print(f"svdd: ended: {self._stop.reason}; {_KEPT}", file=sys.stderr, flush=True)
        raise Stopped(self._stop.code)

    # ---- the thread

    def _run(self) -> None:
        while not self._over.is_set():
            if self._parent is not None and os.getppid() != self._parent:
                self._die("the process that started this one is gone", 1)
            if self._phase != _AFTER:
                self._check_children()
                self._check_peers()
            stop = self._stop
            if stop is not None and self._is_late(stop):
                self._die(stop.reason, stop.code)
            elif stop is None and (number := self._unheard()) is not None:
                self._die(signal.Signals(number).name, 128 + number)
            self._wait(min(1.0, self.patience / 10))

    def _wait(self, seconds: float) -> None:
        """Waits, but not on when a signal comes or the thread's work is over."""
        if self._bell is None:
            self._over.wait(seconds)
            return
        for number in self._bell.wait(seconds):
            if number in _SIGNALS and self._rung is None:
                self._rung = (number, time.monotonic())

    def _is_late(self, stop: _Stop) -> bool:
        """Whether this process has had the time that it was given to end by itself."""
        now = time.monotonic()
        if self._phase == _LOOP or (stop.deadline is not None and self._phase == _AFTER):
            return stop.deadline is not None and now > stop.deadline
        if stop.deadline is not None:
            return True  # nobody is coming to the collective at which this process may wait
        return now > stop.since + self.patience and (self._phase != _END or self._others_stop())

    def _unheard(self) -> int | None:
        """Returns a signal that has not got through to the main thread, which may wait outside of Python."""
        if self._rung is None or self._phase not in (_START, _AFTER):
            return None
        number, since = self._rung
        return number if time.monotonic() > since + _DEAF else None

    def _others_stop(self) -> bool:
        """Whether another process ends on a signal, and will not come to a collective."""
        told = self._peers is not None and bool(self._peers.ranks(STOPPING))
        return told or any(code in TOLD for code in self._children.codes())

    def _check_children(self) -> None:
        for number, code in enumerate(self._children.codes(), 1):
            if code in TOLD:
                self._ask(f"process {number} was told to end", 128 + signal.SIGTERM, None)
            elif code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                self._ask(f"process {number} of this machine {how}", 1, time.monotonic() + self.patience)

    def _check_peers(self) -> None:
        with self._speech:
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
                silence = f"no sign of life for {self._peers.patience:.0f} s (stopped, or its machine is down)"
                self._ask(f"process {rank} has given {silence}", 1, limit)

    # ---- the end

    def _say(self, state: str) -> None:
        with self._speech:
            self._state = state
            if self._peers is not None:
                self._peers.say(state)

    def _last_word(self) -> str:
        """What the others shall hear of a run that ends before its time."""
        return STOPPING if self._stop is not None and self._stop.deadline is None else FAILED

    def _say_last(self) -> None:
        """Says goodbye, or once more why not: nobody repeats it from here on."""
        if self._phase != _AFTER:
            self._say(self._last_word())
        elif self._peers is not None:
            self._peers.leave()

    def _excuse(self, error: BaseException | None) -> Stopped | None:
        """Returns what to end with where an error only says that others have ended on a signal; else None."""
        if error is None or isinstance(error, Stopped) or self._phase != _END:
            return None
        self._check_children()
        self._check_peers()
        told = self._stop is not None and self._stop.deadline is None and self._others_stop()
        return Stopped(self._stop.code) if told and self._stop is not None else None

    def _join(self) -> None:
        """Ends the thread."""
        self._over.set()
        if self._bell is not None:
            self._bell.ring()
        if self._thread is not None:
            self._thread.join()

    def _reap(self) -> None:
        """Waits for the started processes: without limit while they finish a batch on a signal, else not for long."""
        limit = time.monotonic() + self.patience
        waits = self._phase == _LOOP and self._stop is not None and self._stop.deadline is None
        while None in self._children.codes():
            if self._phase == _START or (time.monotonic() > limit and not waits):
                self._children.kill()
            time.sleep(0.05)

    def _die(self, reason: str, code: int) -> None:
        """Ends this process where it stands, even inside a collective that nobody will answer."""
        self._say(STOPPING if code in TOLD else FAILED)
        print(f"svdd: ended: {reason}; {_KEPT}", file=sys.stderr, flush=True)
        self._children.kill()
        os._exit(code)
