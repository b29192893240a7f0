"""Files that are whole or absent, locks, and file system errors that a user can act on."""

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from svdd import UserError

__all__ = ["RunError", "explained", "lock", "sync_folder", "write_atomically"]


class RunError(UserError):
    """The run folder cannot be used, or no longer."""


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes a temporary file and renames it: the file is old or new, never in between.

    Args:
        path: The file to replace.
        data: All of its bytes.
        durable: Also wait until the folder's new entry is on disk; else call `sync_folder` later.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames and new files in a folder durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def lock(path: Path, held: str, flags: int = 0, option: str = "--output") -> int:
    """Opens a file and locks it for the life of this process; forked children do not inherit the lock.

    Args:
        path: The file; it is created if absent.
        held: The message if another process holds it.
        flags: Further flags of `os.open`.
        option: What names the folder on the command line.

    Returns:
        The file descriptor; closing it gives up the lock.

    Raises:
        RunError: If another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace") if path.name == ".lock" else ""
            os.close(descriptor)
            raise RunError(f"{held}{f' ({owner})' if owner else ''}; wait for it, or choose another {option}") from None
        warnings.warn(f"{path} cannot be locked ({error}): do not start a second run in this folder", stacklevel=2)
    if path.name == ".lock":
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


@contextmanager
def explained(path: Path, option: str = "--output") -> Iterator[None]:
    """Turns an error of the file system into one that names the path, the cause and the way out."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the run to {error.filename or path}: {error.strerror or error}; "
            f"what is finished is kept: repair the cause and start the same command again, or choose another {option}"
        ) from error
