"""The `svdd` command: imports the command at hand from `svdd.commands`, and runs it."""

import errno
import json
import os
import sys
import warnings
from contextlib import suppress
from pkgutil import resolve_name

from svdd import UserError, __version__, did_you_mean, first_line, is_out_of_memory, printable, say
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.short_forms import spelled_out
from svdd.commands.streams import exits_explained, protect_streams
from svdd.runs.processes.environment import ignore_incomplete
from svdd.runs.processes.signals import AGENT, die_with_parent, signals
from svdd.runs.secrets import redact
from svdd.runs.tracebacks import users_traceback

__all__ = ["main"]

_COMMANDS = {  # name: module and function in svdd.commands
    "predict": "predict:PredictCLI",
    "study": "study:study",
    "fit": "fit:FitCLI",
    "calibrate": "calibrate:CalibrateCLI",
    "score": "score:score",
    "test-reward": "test_reward:test_reward",
    "compare": "compare:compare",
    "report": "report:report",
    "gallery": "report:gallery",
    "app": "app.command:app",
    "list": "show:show",
    "completion": "completion:completion",
}
_HELP = """\
usage: svdd COMMAND [options]

Steer text-to-image diffusion models with any reward, at inference time.

commands:
  predict    draw guided images for a list of prompts:
             svdd predict --config quickstart --output runs/first
  study      draw many runs that one file describes, with tables and plots:
             svdd study my_study.yaml --output runs/study --devices 2
  fit        train a learned value on rollouts of the pretrained model:
             svdd fit --config fit_value_compressibility --output runs/value
  calibrate  measure how well a value predicts the reward, step by step:
             svdd calibrate --config quickstart --output runs/calibration
  score      measure pictures that exist already with any reward:
             svdd score --reward CLIPScore --images runs/first
  test-reward
             check a reward of your own before you guide with it:
             svdd test-reward my_rewards.Redness
  compare    compare runs in a table with paired differences, and in a picture:
             svdd compare runs/unguided runs/svdd --output compare.png
  report     write runs as one HTML page: pictures, rewards, traces, settings:
             svdd report runs/unguided runs/svdd --output report.html
  gallery    write that page into a run's folder and open it in the browser:
             svdd gallery runs/first
  app        draw in the browser, unguided beside guided pictures (needs pip install 'svdd[app]'):
             svdd app
  list       show every sampler, value, reward and diffusion that can be selected by name
  completion print a script that completes commands, options and names in your shell:
             svdd completion --help

options:
  -h, --help       this help; `svdd predict --help` lists all settings
  --version        print the version

One class's own settings: svdd predict --model.sampler.help SVDD
The traceback of an error within svdd or a library: SVDD_DEBUG=1 svdd ..."""

_HERE = os.path.join(os.path.dirname(__file__), "")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_format_warning = warnings.formatwarning


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process.

    Returns 0, 2 for an error that the user can fix, or 1 for any other error.
    """
    whole_process = arguments is None
    if arguments is None:
        arguments = sys.argv[1:]
        protect_streams()
        signals.listen()  # also while libraries are imported
    command, *words = arguments or ["--help"]
    if command in ("-h", "--help", "--version"):
        say(f"svdd {__version__}" if command == "--version" else _HELP)
        return 0
    try:
        if ignore_incomplete() == "torchrun" and whole_process:  # before Lightning reads the same variables
            die_with_parent()
        _find_files_here()
        if command not in _COMMANDS:
            hint = did_you_mean(command, _COMMANDS)
            raise UserError(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}{hint}")
        words = spelled_out(command, words)
        if command in COMMANDS and {"-h", "--help"} & {*words}:
            from svdd.commands.settings.pages import help_page

            say(help_page(command))
            return 0
        with exits_explained():
            run = resolve_name(f"svdd.commands.{_COMMANDS[command]}")
            warnings.formatwarning = _one_line  # after Lightning's import, which sets its own
            run(words)
    except Exception as error:
        if os.environ.get("SVDD_DEBUG"):
            raise
        return _report(error)
    return 0


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Returns a warning of svdd in one line, and one of a library as Python shows it, without control characters."""
    if filename.startswith(_HERE):
        return printable(f"svdd: warning: {' '.join(str(message).splitlines())}") + "\n"
    return printable(_format_warning(message, category, filename, lineno, line))


def _find_files_here() -> None:
    """Lets class paths name files in the working directory, after the standard library and what is installed."""
    try:
        here = os.getcwd()
    except OSError as error:
        raise UserError("the working directory no longer exists; change to one that does") from error
    if here not in sys.path:
        sys.path.append(here)


def _report(error: Exception) -> int:
    """Prints an error in one line, after the traceback through the user's own code if it went through some."""
    message = f"error: {redact(' '.join(str(error).splitlines()))}"
    if isinstance(error, OSError) and (error.errno in _NO_SPACE or "temporary directory" in str(error)):
        found = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        error = UserError(f"{found}; free some space, or set TMPDIR to another folder for temporary files")
        message = f"error: {error}"
    traceback = users_traceback(error)
    if not isinstance(error, UserError):
        lower = "; lower data.batch_size or model.diffusion.chunk_size" if is_out_of_memory(error) else ""
        where = "" if traceback else " (SVDD_DEBUG=1 shows where)"
        message = f"error: {type(error).__name__}: {redact(first_line(error))}{lower}{where}"
    if traceback:
        say(traceback, error=True)
    if isinstance(error, UserError) and AGENT in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:
        path = os.environ["TORCHELASTIC_ERROR_FILE"]
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"svdd": True, "message": message, "timestamp": 0}, file)
            return 2  # the agent reports
        except OSError:  # it cannot read half a file
            with suppress(OSError):
                os.unlink(path)
    say(f"svdd: {message}", error=True)
    return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
