"""Command lines that svdd prints for its users to run."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from svdd import printable
from svdd.runs.config import CONFIG, is_older, read_config
from svdd.runs.processes.environment import launcher
from svdd.runs.processes.signals import AGENT
from svdd.runs.secrets import redact, redacted

__all__ = ["continuing", "overwriting"]

_BOOLEANS = {"true", "false", "yes", "no"}


def overwriting(words: Sequence[str]) -> str:
    """Returns the command line of these words with `--overwrite`, or a phrase if it cannot be shown as it was given.

    That is so under a launcher, which has started the command with options of its own, with a secret in an option, and
    with characters that a terminal does not show.
    """
    kept: list[str] = []
    for word in words:
        if word.lower() in _BOOLEANS and kept and kept[-1] == "--overwrite":
            kept.pop()
        elif not word.startswith("--overwrite="):
            kept.append(word)
    given = [word for word in kept if word != "--overwrite"]
    command = _command(*given, "--overwrite")
    settings = dict(pairwise(given)) | dict(word.split("=", 1) for word in given if "=" in word)
    shown = [printable(command)] == command.splitlines()
    hidden = not shown or redact(command) != command or redacted(settings) != settings
    launched = launcher() is not None and AGENT not in os.environ
    return "the same command with --overwrite" if hidden or launched else command


def continuing(run: Path) -> str:
    """Returns what continues a run: the command line with its own configuration, or a phrase if that is unknown."""
    recorded = read_config(run)
    if recorded is None or not recorded.config or is_older(recorded.config):
        return f"the `svdd predict` that made {run}"
    return _command(recorded.kind, "--config", str(run / CONFIG), "--output", str(run))


def _command(*words: str) -> str:
    """Returns a command line of svdd in the form in which svdd was started."""
    given = sys.orig_argv[:3]
    program = ["svdd"] if shutil.which("svdd") else [sys.executable, "-m", "svdd"]
    return shlex.join([*(given if given[1:] == ["-m", "svdd"] else program), *words])
