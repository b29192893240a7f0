"""The output folder of a command: its first file says which command it belongs to, and one process holds it."""

from pathlib import Path

from filelock import FileLock

from svdd.runs.config import CONFIG, read_config
from svdd.runs.files import RunError, lock

__all__ = ["check", "hold"]

_LOCK = ".lock"


def hold(folder: Path, kind: str) -> FileLock:
    """Makes a folder the output of a command and locks it until `release` or the end of this process.

    Record the command with `write_config` before any other file is written: from then on, the folder belongs to it.

    Args:
        folder: The folder; it need not exist.
        kind: The name of the command: `predict`, `fit`, `calibrate` or `score`.

    Raises:
        RunError: If it is a file, is in use, belongs to another command, or holds files that svdd did not write.
        OSError: If it cannot be written.
    """
    check(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / _LOCK, f"{folder} is in use by another run")
    try:
        check(folder, kind)  # another command may just have left it
    except BaseException:
        held.release()
        raise
    return held


def check(folder: Path, kind: str) -> None:
    """Raises a RunError as `hold` does, without a change to the folder."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"the output must be a folder, got the file {folder}; choose another --output")
    recorded = read_config(folder)
    if recorded is not None and recorded.kind != kind:
        found = f"{folder} holds the output of `svdd {recorded.kind}`"
        raise RunError(f"{found}, which `svdd {kind}` neither continues nor removes; choose another --output")
    foreign = {path.name for path in folder.iterdir()} - {_LOCK, f"{CONFIG}.tmp"} if folder.exists() else set()
    if recorded is None and foreign:
        why = f"its {CONFIG} was not written by svdd" if CONFIG in foreign else f"it holds {min(foreign)}"
        raise RunError(f"{folder} is not empty and is not a run folder ({why}); choose another --output")
