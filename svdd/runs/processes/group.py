"""The processes of a run: how they meet, agree on an early end, and notice that one of them has died."""

import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import distributed

from svdd import UserError
from svdd.runs.processes.signals import AGENT, signals

__all__ = ["Group", "is_rank_zero"]

_MEETING = timedelta(minutes=30)
_COLLECTIVE = timedelta(days=7)  # a process may have that much more to do; a dead one is noticed by its connection
_GRACE = 30.0  # seconds for the batch at work after another process has died
_COMPLETE, _FAILED = "0", "1"  # verdicts; others are the exit codes of a signal


class Group:
    """Initialises `torch.distributed` before Lightning, which keeps an initialised group.

    `env://` does not work after a restart by torchelastic: the agent's store still holds the addresses of the dead
    processes (torch 2.14). Here each meeting has a name of its own, under which its keys stand.

    Args:
        environment: Rank, world size and the address of the store, as the launcher has set them.
        backend: The backend of the default group, `nccl` or `gloo`.

    Raises:
        UserError: If the processes do not meet within half an hour.
    """

    def __init__(self, environment: ClusterEnvironment, backend: str) -> None:
        self.rank, self.world_size = environment.global_rank(), environment.world_size()
        hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = distributed.TCPStore(
                environment.main_address, environment.main_port, None, hosts, _MEETING, wait_for_workers=False
            )
            self._store = distributed.PrefixStore(self._meet(store), store)
            distributed.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=_COLLECTIVE
            )
            self._ring = distributed.new_group(backend="gloo", timeout=_COLLECTIVE)
        except RuntimeError as error:
            raise UserError(f"process {self.rank} could not meet the other processes: {error}") from error
        threading.Thread(target=self._watch_next, name="svdd-group", daemon=True).start()

    def decide(self, verdict: str) -> int:
        """Returns the exit code with which all processes end: that of the first call anywhere."""
        return int(self._store.compare_set("verdict", "", verdict))

    def check(self) -> int | None:
        """Returns the exit code with which all processes end early, None while there is no reason to."""
        if signals.exit_code is not None:
            return self.decide(str(signals.exit_code))
        return int(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def count_batch(self) -> None:
        """Tells the processes that wait that work goes on."""
        self._store.add("batches", 1)

    def wait(self, patience: float) -> int:
        """Waits until all processes have drawn their share, without a collective that could time out.

        Args:
            patience: Seconds without a finished batch after which the wait, and with it the run, ends.

        Returns:
            0, or the exit code with which all processes end early.
        """
        self._store.add("through", 1)
        batches, since = -1, time.monotonic()
        while (verdict := self.check()) is None:
            if self._store.add("through", 0) == self.world_size:
                return self.decide(_COMPLETE)
            if (count := self._store.add("batches", 0)) != batches:
                batches, since = count, time.monotonic()
            elif time.monotonic() - since > patience:
                print(f"svdd: no process has finished a batch for {patience:.0f} s", file=sys.stderr, flush=True)
                return self.decide(_FAILED)
            time.sleep(0.1)
        return verdict

    def leave(self) -> None:
        """Tells the process that watches this one that it ends in order."""
        with suppress(RuntimeError):
            distributed.send(torch.ones(1), (self.rank - 1) % self.world_size, group=self._ring)

    def _meet(self, store: distributed.TCPStore) -> str:
        """Returns a name that exactly the processes of this attempt share; earlier ones may have left keys."""
        own = uuid.uuid4().hex
        if self.rank > 0:
            store.set(f"svdd/{self.rank}", own)
            name = store.get(f"svdd/{own}").decode()  # waits for rank 0
            store.set(f"svdd/{name}/{self.rank}", "")
            return name
        missing, end = set(range(1, self.world_size)), time.monotonic() + _MEETING.total_seconds()
        while missing:
            if time.monotonic() > end:
                raise RuntimeError(f"no word from {sorted(missing)} for {_MEETING}")
            for rank in missing:
                if store.check([f"svdd/{rank}"]):
                    store.set("svdd/" + store.get(f"svdd/{rank}").decode(), own)
            missing -= {rank for rank in missing if store.check([f"svdd/{own}/{rank}"])}
            time.sleep(0.05)
        return own

    def _watch_next(self) -> None:
        """Waits for the goodbye of the next process; if its connection breaks instead, ends all processes."""
        following = (self.rank + 1) % self.world_size
        try:
            distributed.recv(torch.zeros(1), following, group=self._ring)
        except RuntimeError:
            verdict = int(_FAILED)
            with suppress(RuntimeError):  # the store may be gone too
                verdict = self.decide(_FAILED)
            if verdict == int(_FAILED):
                if AGENT not in os.environ:
                    print(f"svdd: process {following} has died", file=sys.stderr, flush=True)
                time.sleep(_GRACE)
                os._exit(1)


def is_rank_zero() -> bool:
    """Whether this is rank 0 of all, before a Trainer exists; a further node's first process has only NODE_RANK."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0
