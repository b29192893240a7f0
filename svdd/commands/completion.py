"""`svdd completion`: a script by which a shell completes commands, options, names of classes and files."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import shtab

from svdd import say
from svdd.commands.compare import compare_parser
from svdd.commands.configs import shipped
from svdd.commands.options import Options
from svdd.commands.registry import catalogue
from svdd.commands.report import gallery_parser, report_parser
from svdd.commands.settings.known import class_settings, kind_of, settings_of
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.short_forms import SHORT_FORMS
from svdd.commands.show import list_parser
from svdd.commands.study import study_parser
from svdd.evaluation.benchmarks import BENCHMARKS

__all__ = ["completion", "completion_parser"]

_ABOUT = """\
Prints a script that completes commands, options, names of classes, shipped configurations and files. Print it again
after an update, or after a plug-in was installed. To install it:

  bash  mkdir -p ~/.local/share/bash-completion/completions
        svdd completion bash > ~/.local/share/bash-completion/completions/svdd
  zsh   mkdir -p ~/.zfunc; svdd completion zsh > ~/.zfunc/_svdd
        and in ~/.zshrc, before compinit:  fpath+=~/.zfunc
  tcsh  svdd completion tcsh > ~/.svdd.tcsh
        and in ~/.tcshrc:  source ~/.svdd.tcsh
"""
_SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"output", "ckpt_path", "images", "baseline", "reference", "cache", "benchmark_prompts", "features", "lora"}


def completion_parser() -> Options:
    """Returns the parser of `svdd completion`."""
    parser = Options("svdd completion", _ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    return parser


def completion(words: list[str]) -> None:
    """Runs `svdd completion` with the command line after its name; raises UserError for another shell."""
    say(shtab.complete(_whole_parser(), completion_parser().parse_args(words).shell))


def _whole_parser() -> argparse.ArgumentParser:
    """Returns a parser of all commands, which is never used to parse."""
    whole = argparse.ArgumentParser("svdd")
    whole.add_argument("--version", action="version", help="print the version")
    commands = whole.add_subparsers()
    parsers: dict[str, argparse.ArgumentParser] = {name: _configured(name) for name in COMMANDS if " " not in name}
    parsers |= {"study": study_parser(), "compare": compare_parser(), "report": report_parser()}
    parsers |= {"gallery": gallery_parser(), "list": list_parser(), "completion": completion_parser()}
    others = {setting.name for setting in settings_of("predict") if "." not in setting.name} - {"config"}
    _add_settings(parsers["study"], "predict", others)
    for name, parser in parsers.items():
        for action in parser._actions:
            if action.type is Path or action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest == "study":
                action.complete = _words_or_files("studies", shipped(study=True))  # type: ignore[attr-defined]
            elif action.dest == "kinds":
                action.choices = ["samplers", "values", "rewards", "diffusions"]
        commands.add_parser(name, parents=[parser], add_help=False, help=(parser.description or "").partition("\n")[0])
    return whole


def _configured(command: str) -> argparse.ArgumentParser:
    """Returns a parser of a command with a configuration."""
    parser = argparse.ArgumentParser(description=COMMANDS[command].purpose)
    _add_settings(parser, command)
    if command == "score":
        _add_settings(parser, "score --benchmark")
        parser.add_argument("run", nargs="?").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    if command == "test-reward":
        parser.add_argument("positional", nargs="?", choices=_names("reward"))
    return parser


def _add_settings(parser: argparse.ArgumentParser, command: str, without: Iterable[str] = ()) -> None:
    """Adds all settings of a command, and those of the built-in classes that it takes."""
    short = {name: [key, form] for key, (form, name) in SHORT_FORMS.get(command, {}).items()}
    settings = {setting.name: setting for setting in settings_of(command)}
    for name in dict.fromkeys([*settings, *class_settings(command)]):
        if name in without or f"--{name}" in parser._option_string_actions:
            continue
        options: dict[str, Any] = {"action": "store_true"} if name == "print_config" else {}
        words = settings[name].kind.strip("[], .").split("|") if name in settings else []
        if kind := kind_of(name) if name in settings else "":
            options["choices"] = _names(kind)
        elif name == "benchmark":
            options["choices"] = [*BENCHMARKS]
        elif len(words) > 1 and not any(word.isupper() for word in words):
            options["choices"] = [word.strip(", .]") for word in words]
        text = settings[name].help.replace("%", "%%") if name in settings else None
        forms = [form for form in short.get(name, []) if form != f"--{name}"]
        action = parser.add_argument(*forms, f"--{name}", help=text, **options)
        last = name.rpartition(".")[2]
        if last in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif name == "config":
            action.complete = _words_or_files("configs", shipped())  # type: ignore[attr-defined]
        elif last in ("prompts", "pretrained"):
            action.complete = _words_or_files("emoji", ["emoji"])  # type: ignore[attr-defined]


def _names(kind: str) -> list[str]:
    return [entry.name for entry in catalogue() if entry.kind == kind]


def _words_or_files(name: str, words: Iterable[str]) -> dict[str, Any]:
    """Returns what shtab needs to complete these words and files."""
    known, function = " ".join(words), f"_svdd_{name}_or_file"
    bash = f'{function}() {{ compgen -W "{known}" -- "$1"; compgen -f -- "$1"; }}'
    zsh = f'{function}() {{ _alternative "{name}:{name}:({known})" "files:file:_files"; }}'
    return {"bash": function, "zsh": function, "tcsh": "f", "preamble": {"bash": bash, "zsh": zsh}}
