"""The argument parser of all commands: shipped configurations and classes by name, and errors in one line."""

import argparse
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args

import jsonargparse
import jsonargparse._actions as actions
import jsonargparse._loaders_dumpers as loaders
import jsonargparse._typehints as typehints
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from svdd import UserError, did_you_mean, missing_methods
from svdd.commands.configs import find_config
from svdd.commands.own_code import adapt_anew, discard_all, own_error, resolve_help
from svdd.commands.registry import KINDS, catalogue, import_all
from svdd.commands.settings.nearest import hint, hint_in_class, missing, nearest, setting_names
from svdd.runs.config import is_older
from svdd.runs.yaml_text import check_yaml, read_yaml

__all__ = ["Parser", "as_user_errors", "explain", "with_shipped_configs"]

_MAX_CONFIG = 2**24  # bytes
_SECTIONS = {"model", "data", "trainer", "evaluation"}
_LEAST, _MOST = 1e-30, 1e30  # of a number that is not 0: float32 must hold it, and its ratio to a reward
_CARRY_OVER, _ADAPT = "discard_init_args_on_class_path_change", "adapt_typehints"
_NOISE = re.compile(
    r"Expected a <class 'NoneType'>|Expected a path but |Does not validate against|Given value|^\s*(Subtypes|Errors):"
)
_HIDDEN_WARNINGS = (  # of libraries, on which a user cannot act
    r"isinstance.treespec, LeafSpec|have many workers|ranks is zero|LightningCLI's args parameter|"
    r"`IterableDataset` has `__len__`|"
    r"Cannot enable progress bars|module\(s\) in eval mode|smaller than the logging interval|exists and is not empty"
)


class Parser(LightningArgumentParser):
    """Knows all built-in and plug-in classes by name, and reports a bad argument as a `UserError`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import_all()
        warnings.filterwarnings("ignore", message=f".*({_HIDDEN_WARNINGS})")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if not sys.stderr.isatty():  # no progress bars in log files, also none of huggingface_hub
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        if lacking := [name for name in (_CARRY_OVER, _ADAPT) if not hasattr(typehints, name)]:
            found = f"jsonargparse {jsonargparse.__version__} lacks {lacking[0]}, which svdd replaces"
            raise ImportError(f"{found}; install a version that the requirements of svdd allow")
        setattr(typehints, _CARRY_OVER, discard_all)
        setattr(typehints, _ADAPT, adapt_anew)
        setattr(actions._ActionHelpClassPath, "resolve_help_type", resolve_help)  # noqa: B010
        loaders.yaml_load = loaders.loaders["yaml"] = _load_yaml
        setattr(jsonargparse.Path, "read_text", _read_config)  # noqa: B010  (its own blocks on a FIFO)
        super().__init__(*args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses a command line and refuses settings that no class can use."""
        _allow_flags(self)
        settings = super().parse_args(*args, **kwargs)
        _check_settings(settings.as_dict())
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError; jsonargparse's parser of one class has no command in its `prog`."""
        program, _, command = self.prog.rpartition(" ")
        below = next(iter(self._subcommands_action.choices), None) if self._subcommands_action else None
        raise UserError(explain(message, command if program.startswith("svdd") else below))


def _allow_flags(parser: argparse.ArgumentParser) -> None:
    """Lets options that take true or false stand alone, for true."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _allow_flags(command)
        kind = getattr(action, "_typehint", None)
        if action.nargs is None and bool in (kind, *get_args(kind)):
            action.nargs, action.const = "?", True


_read_yaml = loaders.yaml_load


def _load_yaml(text: str) -> Any:
    check_yaml(text)
    return _read_yaml(text)


def _read_config(path: Any) -> str:
    """Returns the text of a configuration; raises a UserError that says what is wrong with the file."""
    file = Path(path)
    try:
        if not file.is_file():
            raise UserError(f"{path} is no regular file, expected a YAML file")
        if file.stat().st_size > _MAX_CONFIG:
            raise UserError(f"{path} has more than {_MAX_CONFIG} bytes; give prompts in a file of their own")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error


def _check_settings(settings: Any, key: str = "") -> None:
    """Raises a UserError for numbers that cannot be computed with, and for text that UTF-8 files cannot hold."""
    if isinstance(settings, Mapping):
        for name, setting in settings.items():
            _check_settings(setting, f"{key}.{name}".lstrip("."))
    elif isinstance(settings, list | tuple):
        for setting in settings:
            _check_settings(setting, key)
    elif isinstance(settings, float) and math.isnan(settings):
        raise UserError(f"{key}: expected a number, got nan")
    elif (
        isinstance(settings, float)
        and math.isfinite(settings)
        and not (settings == 0 or _LEAST <= abs(settings) <= _MOST)
    ):
        raise UserError(f"{key}: expected 0 or a magnitude from {_LEAST} to {_MOST}, got {settings}")
    elif isinstance(settings, int) and abs(settings) >= 2**63:
        raise UserError(f"{key}: expected an integer below 2**63, got {'-' * (settings < 0)}{abs(settings):.3e}")
    elif isinstance(settings, str) and (found := re.search("[\0\ud800-\udfff]", settings)):
        raise UserError(
            f"{key}: character {found.start() + 1} is {found[0]!r}, which cannot be stored as UTF-8; remove it"
        )


def with_shipped_configs(words: list[str]) -> list[str]:
    """Replaces the names of shipped configurations on a command line by their paths; raises UserError if unknown.

    A name has letters, digits, `_` and `-`, may follow a folder, as in `paper/smc`, and may end in `.yaml`. A file of
    that name in the working directory wins. The configuration that a run recorded is replaced by its settings.
    """
    found = list(words)
    for k, word in enumerate(words):
        if option := re.match("(-c|--config)=", word):
            found[k] = option[0] + _check_config(find_config(word.removeprefix(option[0])))
        elif k > 0 and words[k - 1] in ("-c", "--config"):
            found[k] = _check_config(find_config(word))
    return found


def _check_config(name: str) -> str:
    """Returns the path of a configuration, or YAML; refuses a file that holds no settings."""
    if not os.path.exists(name):
        return name  # YAML on the command line, or a mistake
    text = _read_config(name)
    try:
        settings = read_yaml(text)
        if not isinstance(settings, dict):
            raise UserError(f"expected settings as a mapping, such as `model:`, got {_short(settings)}")
        for section in _SECTIONS & settings.keys():
            if not isinstance(settings[section], dict | str):  # a string is the name of another file
                raise UserError(f"{section}: expected settings as a mapping, got {_short(settings[section])}")
    except UserError as error:
        raise UserError(f"--config {name}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {name}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if is_older(settings):
        what = f"--config {name} was recorded by an earlier version of svdd"
        raise UserError(f"{what}: remove rows_at_once, data.prompts_sha256 and overwrite from it")
    return name


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns errors that constructors raise about their arguments, and all in a user's own code, into `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise UserError(explain(str(error))) from error
    except OSError as error:
        raise UserError(f"{error.filename or 'the file system'}: {error.strerror or error}") from error
    except Exception as error:
        if (own := own_error(error)) is None:
            raise
        raise own from error


def explain(message: str, command: str | None = None) -> str:
    """Returns setting, value and what was expected, out of jsonargparse's message, a tree of all types it tried."""
    setting = re.match(r'\s*Parser key "([^"]+)":?\s*', message)
    key, rest = (f"{setting[1]}: ", message[setting.end() :]) if setting else ("", message)
    name = setting[1] if setting else "model.CLASS"
    if foreign := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", message):
        option, command = re.split(r"\.(?:class_path|init_args)\b", foreign[2])[0], foreign[1]
        return _foreign(option, command)
    if typo := re.match(r"(?:unrecognized arguments|ambiguous option): (\S+)", message):
        return message + (hint(typo[1], command) if command else "")
    if bare := re.match(r"argument (--[\w.]+)\S*: expected one argument", message):
        return f"{bare[1]} needs a value; one that begins with a dash follows an equals sign, as in --NAME=-x"
    if lacking := re.search(r"the following arguments are required: ([\w., ]+)", rest):
        if not command:
            return message  # which becomes part of the message about the command
        around = f"{name}." if setting else ""
        return missing([around + each.removeprefix(f"{command}.") for each in lacking[1].split(", ")], command)
    if unknown := re.search(r"Expected a dot import path string: (\S+)", rest):
        return key + _unknown(name, unknown[1])
    if untyped := re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not specify a type", rest):
        return f"{key}{untyped[2]}: the argument {untyped[1]!r} needs a type, such as `{untyped[1]}: float`"
    given = re.search(r"(?:class, but|Given value: (?:{'class_path': ')?)\s*(\w+(?:\.\w+)+)", rest)
    if given and " is abstract" in rest:
        return f"{key}class {given[1]!r} cannot be used: {missing_methods(resolve_name(given[1]))}"
    if setting and re.search(r"argument of type '\w+' is not|'\w+' object (has no|is not) ", rest):
        return f"{key}malformed; expected a name, or a mapping with class_path (a name) and init_args (a mapping)"
    if file := re.search(r"^Unable to load config ['\"]?([^'\"]*)", rest):
        return (
            f"{name.partition('.')[0]}: expected settings, or the name of a YAML file with them, got {_short(file[1])}"
        )
    if base := re.search(r"Not a valid subclass of (\w+)", rest):
        return f"{key}expected the name of a {base[1]}, or a mapping with class_path and init_args{_got(rest)}"
    if argument := re.search(r"Option '([^']+)' is not accepted", rest):
        if command and not key:
            return _foreign(argument[1], command)
        if not command:
            return message
        told = f"{key}no argument {argument[1]!r}; `svdd {command} --{name}.help NAME` lists what class NAME takes"
        return told + hint_in_class(argument[1], name, command)
    if path := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", rest):
        reason = " ".join(path[2].split())
        where = " (the working directory is searched for files)" if reason.startswith("No module named") else ""
        return f"{key}{path[1]!r} cannot be used: {reason}{where}"
    if inner := re.search(r'Parser key "([^"]+)":?\s*(.*)', rest):
        return f"{name}.{inner[1]}: {_plain(inner[2])}"
    reasons = [line.strip(" -") for line in rest.splitlines() if line.strip(" -") and not _NOISE.search(line)]
    kinds = [_plain(line) for line in reasons if line.startswith("Expected a ") and "Got value" not in line]
    if len(kinds) > 1:  # of a union
        if len(kinds) == len(reasons):
            names = [kind.removeprefix("expected ") for kind in kinds]
            return f"{key}expected {', '.join(names[:-1])} or {names[-1]}{_got(rest)}"
        reasons = [line for line in reasons if "Got value" in line] or reasons
    return key + _plain(" ".join(reasons) or rest)


def _foreign(option: str, command: str) -> str:
    """Returns a message about a setting in a configuration that the command does not have."""
    found = nearest(option, setting_names(command))
    rest = f"; did you mean {found!r}?" if found else f", remove it; `svdd {command} --help` lists all settings"
    return f"`svdd {command}` has no setting {option!r}{rest}"


def _got(message: str) -> str:
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    return f", got {value[1][:80]}" if value else ""


def _unknown(key: str, name: str) -> str:
    kind = key.rsplit(".", 1)[-1].removeprefix("eval_").rstrip("s")
    if kind not in KINDS:
        return f"{name!r} is not a class path such as package.module.Class"
    known = [entry.name for entry in catalogue() if entry.kind == kind]
    if name in known:
        return f"{kind} {name!r} cannot be used here: `svdd fit` trains a learned value, such as LatentConvValue"
    hint = did_you_mean(name, known)
    return f"unknown {kind} {name!r}; known: {', '.join(known)}{hint} (a class of your own: my_file.MyClass)"


def _plain(text: str) -> str:
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", lambda match: "one of " + match[1].replace("'", ""), text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return " ".join(text.replace("Expected a ", "expected ").replace(". Got value:", ", got").split())
