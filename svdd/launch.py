"""Which of several processes this one is, and what they have in common, before they have met."""

import hashlib
import os
import socket
from typing import NamedTuple

from lightning.fabric.plugins.environments import SLURMEnvironment

__all__ = ["LEADER", "Launch", "launched", "led"]

LEADER = "SVDD_LEADER"  # names the process that starts the others of its machine, for them to know


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
