"""The processes of a run: how they meet, agree on an early end, and notice that one of them has died."""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import distributed

from svdd import UserError, say
from svdd.runs.processes.environment import node_rank
from svdd.runs.processes.signals import AGENT, STOP_EXIT_CODES, signals

__all__ = ["Group", "is_rank_zero"]

_MEETING = timedelta(minutes=30)
_COLLECTIVE = timedelta(days=7)  # one process may have far more to do; a dead one is noticed by its connection
_GRACE = 30.0  # seconds to finish the current batch after another process has died
_COMPLETE, _FAILED = "0", "1"  # verdicts, besides the exit codes of signals


class Group:
    """Initialises `torch.distributed` before Lightning, which keeps an initialised group.

    `env://` fails after a restart by torchelastic: the agent's store still holds the addresses of dead processes (torch
    2.14). Here each attempt prefixes its keys with a unique name.

    Args:
        environment: Rank, world size and the address of the store, from the launcher.
        backend: The backend of the default group, `nccl` or `gloo`.

    Raises:
        UserError: If the processes do not meet within half an hour.
    """

    def __init__(self, environment: ClusterEnvironment, backend: str) -> None:
        self.rank, self.world_size = environment.global_rank(), environment.world_size()
        self._hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = distributed.TCPStore(
                environment.main_address, environment.main_port, None, self._hosts, _MEETING, wait_for_workers=False
            )
            self._store = distributed.PrefixStore(self._meet(store), store)
            distributed.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=_COLLECTIVE
            )
            self._previous, following = self._connect(environment)
        except (RuntimeError, OSError) as error:
            raise UserError(f"process {self.rank} could not meet the other processes: {error}") from error
        threading.Thread(target=self._watch, args=(following,), name="svdd-group", daemon=True).start()

    def decide(self, verdict: str) -> int:
        """Returns the exit code of all processes: the verdict of the first call in any of them."""
        return int(self._store.compare_set("verdict", "", verdict))

    def check(self) -> int | None:
        """Returns the exit code if all processes are to end early, else None."""
        if signals.exit_code is not None:
            verdict = self.decide(str(signals.exit_code))
        elif self._store.check(["verdict"]):
            verdict = int(self._store.get("verdict"))
        else:
            return None
        self._store.add("informed", 1)
        while self._hosts and verdict in STOP_EXIT_CODES and not self._store.check(["lost"]):
            if self._store.add("informed", 0) == self.world_size:
                break
            time.sleep(0.1)
        return verdict

    def count_batch(self) -> None:
        """Tells waiting processes that another batch is finished."""
        self._store.add("batches", 1)

    def wait(self, patience: float) -> int:
        """Waits, without a collective, until all processes have drawn their share; returns the exit code.

        After `patience` seconds without a finished batch the run fails.
        """
        self._store.add("through", 1)
        batches, since = -1, time.monotonic()
        while (verdict := self.check()) is None:
            if self._store.add("through", 0) == self.world_size:
                return self.decide(_COMPLETE)
            if (count := self._store.add("batches", 0)) != batches:
                batches, since = count, time.monotonic()
            elif time.monotonic() - since > patience:
                say(f"svdd: no process has finished a batch for {patience:.0f} s", error=True)
                return self.decide(_FAILED)
            time.sleep(0.1)
        return verdict

    def is_broken(self) -> bool:
        """Whether a process has died, which can cause an error in a collective."""
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end and not self._store.check(["lost"]):
                time.sleep(0.1)
            return self._store.check(["lost"])
        except RuntimeError:
            return True  # the process with the store has died

    def leave(self) -> None:
        """Tells the process that watches this one that this is an orderly end."""
        with suppress(OSError):
            self._previous.send(b".")

    def _meet(self, store: distributed.TCPStore) -> str:
        """Returns a name shared by the processes of this attempt only; earlier ones may have left keys."""
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

    def _connect(self, environment: ClusterEnvironment) -> tuple[socket.socket, socket.socket]:
        """Returns connections from the previous and to the next process, which break when that process dies."""
        with socket.create_connection((environment.main_address, environment.main_port)) as probe:
            host = probe.getsockname()[0]
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            self._store.set(f"address/{self.rank}", f"{host} {server.getsockname()[1]}")
            host, port = self._store.get(f"address/{(self.rank + 1) % self.world_size}").decode().split()
            following = socket.create_connection((host, int(port)))
            previous, _ = server.accept()
        following.settimeout(None)
        following.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices a machine that is switched off
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                following.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return previous, following

    def _watch(self, following: socket.socket) -> None:
        """Waits for the next process to leave; if its connection breaks instead, ends all processes."""
        with suppress(OSError):
            if following.recv(1):
                return
        with suppress(RuntimeError):  # the store may be gone too
            self._store.set("lost", "")
            if self.decide(_FAILED) in STOP_EXIT_CODES:
                return
        if AGENT not in os.environ:
            say(f"svdd: process {(self.rank + 1) % self.world_size} has died", error=True)
        time.sleep(_GRACE)
        os._exit(1)


def is_rank_zero() -> bool:
    """Whether this is global rank 0, also before a Trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0 and node_rank() == 0
