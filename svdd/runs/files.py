"""Atomic writes, locks, and file system errors as messages that a user can act on."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from svdd import UserError

__all__ = ["RunError", "lock", "os_errors_explained", "sync_folder", "write_atomically"]

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunError(UserError):
    """The run folder cannot be used."""


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes a temporary file and renames it, so that the file is always either old or new.

    Args:
        path: The file to replace.
        data: Its new content.
        durable: Also wait until the rename is on disk; if False, call `sync_folder` later.
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
    """Makes renames and new files in a folder durable, where the system can."""
    with suppress(OSError):  # Windows cannot open a folder, and some file systems cannot sync one
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path: Path, held: str, option: str = "--output") -> FileLock:
    """Locks a file until `release` is called or this process ends, however it ends; children do not inherit the lock.

    Args:
        path: The lock file; it is created if absent and names the process that holds it.
        held: The error message if another process holds it.
        option: The command-line option that names the folder.

    Raises:
        RunError: If another process holds the lock.
    """
    file_lock = FileLock(path, timeout=0, thread_local=False)
    try:
        file_lock.acquire()
    except Timeout:
        owner = ""
        with suppress(OSError):
            owner = path.read_text(encoding="utf-8", errors="replace")
        raise RunError(f"{held}{owner and f' ({owner})'}; wait for it, or choose another {option}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path} cannot be locked ({error}): do not start a second run in this folder", stacklevel=2)
    else:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return file_lock


@contextmanager
def os_errors_explained(path: Path, option: str = "--output") -> Iterator[None]:
    """Turns an error of the file system into a RunError that names the path, the cause and what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the run to {error.filename or path}: {error.strerror or error}; "
            f"what is finished is kept: fix the cause and start the same command again, or choose another {option}"
        ) from error
