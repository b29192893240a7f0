"""Tracebacks through code that is neither svdd's nor a library's: a user's own files, and plug-ins."""

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from svdd import say
from svdd.runs.secrets import redact

__all__ = ["Tracebacks", "users_traceback"]

_INSTALLED = (f"{Path(__file__).parents[1]}{os.sep}", os.path.join(sysconfig.get_path("stdlib"), ""))
_LITERAL = re.compile(  # a string that a source line gives to something with the name of a secret
    r"(\b[\w-]*(?:api[-_]?key|passw|secret|token|authorization|credential)\w*['\"\]]*\s*[:=]+\s*[rbuf]*)(['\"]).*?\2",
    re.I,
)


class Tracebacks:
    """Prints each traceback once."""

    def __init__(self) -> None:
        self._shown = {""}

    def show(self, traceback: str, message: str = "") -> None:
        """Prints a traceback, if it is new and not empty, and then the message."""
        if traceback not in self._shown:
            self._shown.add(traceback)
            say(f"{traceback}\n{message}".rstrip(), error=True)


def users_traceback(error: BaseException) -> str:
    """Returns the traceback of an error or of its cause, from the first frame in the user's own code on.

    Of the frames in libraries only the last one stays. Secrets are not shown. Empty if the user's code had no part.
    """
    plugins, seen = _plugins(), set[int]()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if found := "".join(_lines(traceback.TracebackException.from_exception(each), plugins)).rstrip():
            return _LITERAL.sub(r"\1\2***\2", redact(found))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return ""


def _lines(shown: traceback.TracebackException, plugins: tuple[str, ...]) -> Iterator[str]:
    """Yields the lines of the user's part of a traceback, after those of the errors that led to it."""
    frames = list(shown.stack)
    while frames and not _is_users(frames[0].filename, plugins):
        frames.pop(0)
    if not frames and not _is_users(getattr(shown, "filename", None), plugins):  # a SyntaxError has a file, no frame
        return
    before = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    if before and (led := list(_lines(before, plugins))):
        yield from led
        cause = "The above exception was the direct cause of" if shown.__cause__ else "While it was handled, there came"
        yield f"\n{cause} the following exception:\n\n"
    if frames:
        yield "Traceback (most recent call last):\n"
        kept = [frame for frame in frames[:-1] if _is_users(frame.filename, plugins)] + frames[-1:]
        yield from traceback.StackSummary.from_list(kept).format()
    yield from shown.format_exception_only()


def _is_users(file: str | None, plugins: tuple[str, ...]) -> bool:
    """Whether a file is a user's own, or belongs to a plug-in."""
    if file is None or not os.path.isfile(file):
        return False
    installed = {"site-packages", "dist-packages"} & {*file.split(os.sep)} or file.startswith(_INSTALLED)
    return not installed or file.startswith(plugins)


def _plugins() -> tuple[str, ...]:
    """Returns the folders and files of all plug-ins."""
    specs = [find_spec(plugin.module.partition(".")[0]) for plugin in entry_points(group="svdd.plugins")]
    found = [(spec.origin or "", spec.submodule_search_locations or []) for spec in specs if spec is not None]
    return tuple(path for file, folders in found for path in ([os.path.join(f, "") for f in folders] or [file]) if path)
