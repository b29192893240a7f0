"""The environment variables of launchers, which count only in the sets that a launcher makes.

A container, a batch script or an earlier shell often leaves single ones behind, and Lightning reads each on its own.
"""

import os
from collections.abc import Mapping

from svdd import UserError

__all__ = ["ignore_incomplete", "launcher", "node_rank", "restarted"]

_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", *_MEETING)
_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")
_UNKNOWN = ("RANK", "WORLD_SIZE", *_MEETING)  # as PyTorch's env:// reads them: Kubeflow, a script of the user's own
_LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "SLURM_NTASKS": 1, "MASTER_PORT": 1}
_BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}


def launcher() -> str | None:
    """Returns `torchrun` or `SLURM` if that started this process, else None.

    Raises:
        UserError: If a complete set holds a value that no launcher writes, or is that of an unknown launcher.
    """
    if _has("TORCHELASTIC_RUN_ID", *_TORCHRUN):
        _numbers(_TORCHRUN)
        return "torchrun"
    if _has(*_SLURM) and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # shells, as in Lightning
        _numbers((*_SLURM, *(name for name in _MEETING if name in os.environ)))
        return "SLURM"
    if _has(*_UNKNOWN) and _numbers(_UNKNOWN)["WORLD_SIZE"] > 1:
        found = f"RANK and WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment belong to no torchrun and no srun"
        raise UserError(f"{found}: start the command with one of these, or unset both")
    return None


def ignore_incomplete() -> str | None:
    """Returns `launcher()`, and removes the variables of all other launchers from this process's environment."""
    started = launcher()
    kept = {"torchrun": ("TORCHELASTIC_", *_TORCHRUN), "SLURM": ("SLURM_", *_MEETING)}.get(started or "", ())
    ours = ("TORCHELASTIC_", "SLURM_", "JSM_NAMESPACE_", "LSB_DJOB_", "NODE_RANK", *_TORCHRUN)
    for name in list(os.environ):
        if name.startswith(ours) and not name.startswith(kept):
            del os.environ[name]
    return started


def restarted() -> bool:
    """Whether torchrun has started this process again after another one of the launch has died."""
    return launcher() == "torchrun" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def node_rank() -> int:
    """Returns the number of this machine among those of a launch, 0 for a single one."""
    if _has("TORCHELASTIC_RUN_ID", *_TORCHRUN):
        return _numbers(_TORCHRUN)["GROUP_RANK"]
    if _has("NODE_RANK", "WORLD_SIZE", *_MEETING):  # the machines of Lightning's own launcher, for a user's script
        return _numbers(("NODE_RANK", "WORLD_SIZE", *_MEETING))["NODE_RANK"]
    return 0


def _has(*names: str) -> bool:
    return all(os.environ.get(name) for name in names)


def _numbers(names: tuple[str, ...]) -> Mapping[str, int]:
    """Returns the variables that are numbers; UserError if one is not, or is out of range."""
    numbers: dict[str, int] = {}
    for name in names:
        if name == "MASTER_ADDR":
            continue
        text, least = os.environ[name], _LEAST.get(name, 0)
        if not text.isascii() or not text.isdigit() or not least <= int(text) < 2**31:
            found = f"{name}={text!r} in the environment is no launcher's"
            raise UserError(f"{found}: expected an integer >= {least}; unset it")
        numbers[name] = int(text)
    for rank, size in _BELOW.items():
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            found = f"{rank}={numbers[rank]} and {size}={numbers[size]} in the environment contradict each other"
            raise UserError(f"{found}: a rank lies below its size; unset both")
    return numbers
