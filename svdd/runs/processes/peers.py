"""Who works on a run together, and the signs of life that they leave for each other in its folder."""

import hashlib
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from svdd.runs.config import CONFIG, HEADER

__all__ = ["DONE", "FAILED", "GONE", "LEADER", "RUNNING", "STOPPING", "Launch", "Peers", "launched", "leads", "led"]

LEADER = "SVDD_LEADER"  # names the process that starts the others of its machine, for them to know

RUNNING, DONE, STOPPING, FAILED, GONE = "running", "done", "stopping", "failed", "gone"

_NAME = re.compile(r"\.rank-\d{5,}(-[0-9a-f]+)?")


class Launch(NamedTuple):
    """This process among those that were started together.

    Attributes:
        rank: This process.
        world_size: The number of processes.
        name: What all of them are called, and nobody who works at the same time is.
        unique: Whether no earlier launch can have had the name.
    """

    rank: int
    world_size: int
    name: str
    unique: bool = True


class Peers:
    """What this process says to the others, and what they have said.

    Each process rewrites a file of a few bytes, `.rank-00003-1a2b3c4d`, with a count and what it is doing; the letters
    at the end are those of the launch, for two launches in one folder not to disturb each other. A process whose file
    has not changed for a while is lost: stopped, or its machine is down. Clocks are never compared between machines,
    and a file is opened anew for every look, so that it works on network file systems too.

    Args:
        folder: The run folder, which all processes see.
        launch: This process, and how many there are.
        patience: Seconds without a change after which a process counts as lost.
        met: Whether all processes have met, so that the folder is theirs. Until then nothing is said where it is no run
            folder; and where the launch's name may be that of an earlier one, the words that stand there at first
            count once they change.
        clock: Seconds that never run backwards.
    """

    def __init__(
        self,
        folder: Path,
        launch: Launch,
        patience: float,
        met: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.patience = patience
        self._config, self._own, self._clock = folder / CONFIG, _path(folder, launch, launch.rank), clock
        self._met = met
        self._paths = {rank: _path(folder, launch, rank) for rank in range(launch.world_size) if rank != launch.rank}
        self._words: dict[int, bytes] = dict.fromkeys(self._paths, b"")
        self._old: dict[int, bytes] = dict.fromkeys(self._paths, b"") if met or launch.unique else {}
        self._changed: dict[int, float] = dict.fromkeys(self._paths, clock())
        self._looked = clock()
        self._count = 0

    def say(self, state: str) -> None:
        """Tells the others that this process lives and what it is doing; that a disk is full is no reason to end."""
        self._count += 1
        with suppress(OSError):
            if not self._met and not self._is_run_folder():
                return
            descriptor = os.open(self._own, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, f"{self._count:012d} {state:<10}\n".encode(), 0)  # in place: no new block needed
            finally:
                os.close(descriptor)

    def _is_run_folder(self) -> bool:
        with open(self._config, "rb") as file:
            return file.read(len(HEADER)) == HEADER.encode()

    def look(self) -> None:
        """Reads what the others say. A process that was itself held up judges nobody by the time it missed."""
        now = self._clock()
        if now - self._looked > self.patience / 2:
            self._changed = dict.fromkeys(self._paths, now)
        self._looked = now
        for rank, path in self._paths.items():
            words = self._words[rank]
            try:
                words = path.read_bytes()
            except FileNotFoundError:
                words = GONE.encode() if words else words  # it said goodbye, or nothing yet
            except OSError:
                continue
            if words == self._old.setdefault(rank, words):
                continue
            if words != self._words[rank]:
                self._words[rank], self._changed[rank] = words, now

    def state(self, rank: int) -> str:
        """Returns what another process was doing at the last look; nothing heard yet reads as running."""
        return (self._words[rank].decode("ascii", "replace").split() or [RUNNING])[-1]

    def ranks(self, *states: str) -> list[int]:
        """Returns the other processes that are in one of these states."""
        return [rank for rank in self._paths if self.state(rank) in states]

    def lost(self) -> list[int]:
        """Returns the processes that have said nothing for too long and were not through."""
        now = self._clock()
        alive = self.ranks(RUNNING, DONE)
        return [rank for rank in alive if now - self._changed[rank] > self.patience]

    def leave(self) -> None:
        """Says goodbye."""
        with suppress(OSError):
            self._own.unlink()

    @staticmethod
    def forget(folder: Path, launch: Launch | None = None) -> None:
        """Removes what the processes of earlier runs have left; for rank 0, once the folder is its own.

        Args:
            folder: The run folder.
            launch: The present launch, whose words stay.
        """
        kept = f"-{launch.name}" if launch is not None and launch.unique else " "
        with suppress(OSError):
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name) and not path.name.endswith(kept):
                    path.unlink()


def leads() -> bool:
    """Whether this is rank 0 of all, before a Trainer exists; a further node's first process has only NODE_RANK."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0


def launched(num_nodes: int) -> Launch | None:
    """Returns what the environment says; None for a process that is alone, or starts the others itself.

    Args:
        num_nodes: The number of machines that the Trainer is set to. Where there are several and no launcher, somebody
            starts each by hand, and they say nothing of each other before they meet.
    """
    here, parent = socket.gethostname(), os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        owner = (here, parent) if one_machine else ()  # else a repeated command has the address of the one before
        given = _values("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        return Launch(rank, world_size, _name(*owner, *given), one_machine)
    if SLURMEnvironment.detect():
        rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        given = _values("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return Launch(rank, world_size, _name(*given))
    if "LOCAL_RANK" in os.environ and LEADER in os.environ and num_nodes == 1:
        return led(int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ[LEADER]))
    return None


def led(rank: int, world_size: int, leader: int | None = None) -> Launch:
    """Returns what the processes have in common that Lightning starts on this machine.

    Args:
        rank: This process.
        world_size: The number of processes.
        leader: The process that starts them; None where there are several machines, which have met by now.
    """
    owner = (socket.gethostname(), leader) if leader is not None else _values("MASTER_ADDR", "MASTER_PORT")
    return Launch(rank, world_size, _name(*owner))


def _values(*names: str) -> tuple[str, ...]:
    return tuple(os.environ.get(name, "") for name in names)


def _name(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _path(folder: Path, launch: Launch, rank: int) -> Path:
    return folder / f".rank-{rank:05d}-{launch.name}"
