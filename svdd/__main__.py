"""The `svdd` command: dispatches to `svdd.commands`, which it imports on demand."""

import json
import os
import sys
from collections.abc import Sequence

from svdd import UserError, __version__

__all__ = ["main"]

_COMMANDS = ("predict", "fit", "calibrate", "score", "compare", "list")
_HELP = """\
usage: svdd COMMAND [options]

Steer text-to-image diffusion models with any reward, at inference time.

commands:
  predict    draw guided images for a list of prompts:
             svdd predict --config quickstart --output runs/first
  fit        train a learned value on rollouts of the pretrained model:
             svdd fit --config fit_value_compressibility --output runs/value
  calibrate  measure how well a value predicts the reward, step by step:
             svdd calibrate --config quickstart --output runs/calibration
  score      measure pictures that exist already with any reward:
             svdd score --reward CLIPScore --images runs/first
  compare    put runs of the same prompts side by side in one picture:
             svdd compare runs/unguided runs/svdd --output compare.png
  list       show every sampler, value, reward and diffusion that can be selected by name

options:
  -h, --help       this help; `svdd predict --help` lists all settings
  --version        print the version

One class's own settings: svdd predict --model.sampler.help SVDD
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for an error that the user can fix.

    Args:
        arguments: The command line without the program's name; the process's own by default.
    """
    if arguments is None:
        _listen()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(f"svdd {__version__}")
        return 0
    if not sys.stderr.isatty():  # no progress bars in log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, os.getcwd())  # a user's own file is named by its class path; console scripts lack this entry
    try:
        if command == "list":
            from svdd.commands.registry import show

            show(words[1:])
        elif command == "compare":
            from svdd.commands.compare import compare

            compare(words[1:])
        elif command in _COMMANDS:
            from svdd.commands.cli import run

            run(arguments)
        else:
            from svdd import nearest

            near = nearest(command, list(_COMMANDS))
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}{hint}")
    except UserError as error:
        if os.environ.get("SVDD_DEBUG"):
            raise
        _report(f"error: {error}")
        return 2
    except BrokenPipeError:  # `svdd list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _listen() -> None:
    """Handles signals from now on, also while libraries are imported, and ends this process with its launcher."""
    from svdd.runs.processes.signals import die_with_parent, signals

    signals.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def _report(message: str) -> None:
    """Prints an error, or hands it to the svdd command that started this process, which prints it once."""
    from svdd.runs.processes.signals import AGENT

    if AGENT in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump({"svdd": True, "message": message, "timestamp": 0}, file)
    else:
        print(f"svdd: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
