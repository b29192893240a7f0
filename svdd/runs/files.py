"""Atomic writes, locks, and file system errors as messages that a user can act on."""

import errno
import json
import os
import re
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from svdd import UserError

__all__ = [
    "OtherRun",
    "RunError",
    "append",
    "lock",
    "natural",
    "os_errors_explained",
    "read_object",
    "regular_only",
    "replacing",
    "sync_folder",
    "write_atomically",
]

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class RunError(UserError):
    """The run folder cannot be used."""


class OtherRun(RunError):
    """The folder holds another run, which `what` states; commands add the command line that removes it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Choose another --output, or remove the old run with --overwrite")
        self.what = what


def regular_only(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses FIFOs and devices, which may never end, with an OSError."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"expected a regular file, found {kind}", path)
    return descriptor


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if there is none or the file is damaged."""
    with suppress(FileNotFoundError, ValueError, RecursionError):
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Opens a temporary file that takes the place of `path` at the end: a crash leaves either the old file or the new.

    With `durable` it waits until the rename is on disk; otherwise, call `sync_folder` later.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", opener=regular_only) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Replaces the content of a file; see `replacing`."""
    with replacing(path, durable) as file:
        file.write(data)


def append(file: FileIO, data: bytes) -> None:
    """Appends data in one write and returns when it is on disk; raises an OSError if not all of it fits."""
    if os.write(file.fileno(), data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
    if not os.path.exists(file.name):
        raise FileNotFoundError(errno.ENOENT, "the file was removed while it was written", str(file.name))
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames and new files in a folder durable, where the system can."""
    with suppress(OSError):  # Windows cannot open a folder, and some file systems cannot sync one
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path: Path, held: str, option: str = "--output") -> FileLock:
    """Locks a file until `release` or the end of this process; child processes do not inherit the lock.

    The file names the process that holds it. If that is another one, the message of the RunError begins with `held`.
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
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
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


def natural(name: str) -> tuple[list[str | int], str]:
    """Returns the alternating texts and numbers of a name, text first; then the name, for equal ones."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))], name
