"""Standard streams that may be closed, and exits that are not ours: neither may end the work early and unnoticed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from svdd import Incomplete, Stopped, UserError

__all__ = ["exits_explained", "protect_streams"]

_MAY_EXIT = {"svdd", "argparse", "jsonargparse"}  # packages whose SystemExit is deliberate, for example after --help


class _Lenient:
    """A text stream that drops what cannot be written, because its reader has left or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        """Sends this and all later output to the null device."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def protect_streams() -> None:
    """Makes output optional: neither a closed stream nor a broken pipe (`svdd predict | true`) ends the command."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file that is opened would take its number, and receive the output
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Lenient(stream))


@contextmanager
def exits_explained() -> Iterator[None]:
    """Turns `sys.exit` in a user's or a library's code into a `UserError`: an exit code of 0 would hide lost work."""
    try:
        yield
    except (Stopped, Incomplete):
        raise
    except SystemExit as error:
        frames, traceback = [], error.__traceback__
        while traceback is not None:
            frames.append((traceback.tb_frame.f_globals.get("__name__", ""), traceback))
            traceback = traceback.tb_next
        module, last = next((name, found) for name, found in reversed(frames) if name != "_sitebuiltins")
        if module.partition(".")[0] in _MAY_EXIT:
            raise
        place = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
        raise UserError(
            f"{place} called sys.exit({'' if error.code is None else repr(error.code)}), which would end the command "
            "before its work is done; raise an error there instead (what is finished is kept)"
        ) from error
