"""The `svdd` command: answers what it can at once, and imports the rest on demand."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from svdd import UserError, __version__

__all__ = ["main"]

_COMMANDS = ("predict", "fit", "calibrate", "score", "compare", "list")
_HELP = """\
usage: svdd COMMAND [options]

Steer text-to-image diffusion models with any reward, at inference time.

commands:
  predict    draw guided images for a list of prompts:
             svdd predict --config configs/quickstart.yaml --output runs/first
  fit        train a learned value on rollouts of the pretrained model:
             svdd fit --config configs/fit_value_compressibility.yaml --output runs/value
  calibrate  how well a value predicts the reward, step by step:
             svdd calibrate --config configs/quickstart.yaml --output runs/calibration
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
    """Runs one command and returns its exit code: 0, or 2 for what the user can repair.

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
    if not sys.stderr.isatty():  # no terminal: no progress bars while weights are read
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, os.getcwd())  # a user's own file is named by its class path; console scripts lack this entry
    try:
        if command == "list":
            _list(words[1:])
        elif command == "compare":
            _compare(words[1:])
        elif command == "score":
            from svdd.commands.cli import run_score

            run_score(words[1:])
        elif command in ("predict", "fit", "calibrate"):
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
        _report(f"svdd: error: {error}")
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
    """Prints an error, or leaves it to the process that started several of us, which prints it once."""
    from svdd.runs.processes.signals import AGENT

    if AGENT in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump({"svdd": True, "message": message.removeprefix("svdd: "), "timestamp": 0}, file)
    else:
        print(message, file=sys.stderr)


def _compare(words: Sequence[str]) -> None:
    from svdd.commands.compare import compare

    parser = argparse.ArgumentParser(prog="svdd compare", description="Runs of the same prompts in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one column each")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="PNG file (default: compare.png)")
    parser.add_argument("--limit", type=int, default=8, help="at most this many images (default: 8)")
    options = parser.parse_args(words)
    print(compare(options.runs, options.output, max(1, options.limit)))
    print(f"wrote {options.output}")


def _list(words: Sequence[str]) -> None:
    from svdd.commands.registry import KINDS, catalogue

    if unknown := [word for word in words if word not in KINDS]:
        raise UserError(f"svdd list takes {', '.join(KINDS)} or nothing, got {unknown[0]!r}")
    kinds = list(words) or list(KINDS)
    entries = [entry for entry in catalogue() if entry.kind in kinds]
    width = max(len(entry.name) for entry in entries)
    for kind in kinds:
        print(f"{kind}:")
        for entry in entries:
            if entry.kind == kind:
                source = "" if entry.package == "svdd" else f"  [{entry.package}]"
                print(f"  {entry.name:<{width}}  {entry.description}{source}")


if __name__ == "__main__":
    sys.exit(main())
