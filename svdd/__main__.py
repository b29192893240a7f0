"""The `svdd` command: imports the command at hand from `svdd.commands`, and runs it."""

import json
import os
import sys
from pkgutil import resolve_name

from svdd import UserError, __version__, did_you_mean
from svdd.runs.processes.environment import ignore_incomplete
from svdd.runs.processes.signals import AGENT, die_with_parent, signals

__all__ = ["main"]

_COMMANDS = {  # name: module and function in svdd.commands
    "predict": "predict:PredictCLI",
    "fit": "fit:FitCLI",
    "calibrate": "calibrate:CalibrateCLI",
    "score": "score:score",
    "compare": "compare:compare",
    "list": "registry:show",
}
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

One class's own settings: svdd predict --model.sampler.help SVDD"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns 0, or 2 for an error that the user can fix."""
    whole_process = arguments is None
    if arguments is None:
        arguments = sys.argv[1:]
        signals.listen()  # also while libraries are imported
    command, *words = arguments or ["--help"]
    if command in ("-h", "--help", "--version"):
        print(f"svdd {__version__}" if command == "--version" else _HELP)
        return 0
    sys.path.insert(0, os.getcwd())  # a user's own file is named by its class path; console scripts lack this entry
    try:
        if ignore_incomplete() == "torchrun" and whole_process:  # before Lightning reads the same variables
            die_with_parent()
        if command not in _COMMANDS:
            hint = did_you_mean(command, _COMMANDS)
            raise UserError(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}{hint}")
        resolve_name(f"svdd.commands.{_COMMANDS[command]}")(words)
    except UserError as error:
        if os.environ.get("SVDD_DEBUG"):
            raise
        if AGENT in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:  # the command that started this one reports
            with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
                json.dump({"svdd": True, "message": f"error: {error}", "timestamp": 0}, file)
        else:
            print(f"svdd: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `svdd list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
