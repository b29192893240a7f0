"""The argument parser of all commands: names of the registry, defaults of each class, and errors in one line."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import jsonargparse
import jsonargparse._typehints as typehints
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from svdd import UserError, missing_methods, nearest
from svdd.commands.configs import with_shipped_configs
from svdd.commands.registry import KINDS, import_all, names_of

__all__ = ["Parser", "as_user_errors", "explain"]

_NOISE = re.compile(
    r"Expected a <class 'NoneType'>|Expected a path but |Does not validate against|Given value|^\s*(Subtypes|Errors):"
)


class Parser(LightningArgumentParser):
    """Knows all built-in and plug-in classes by name, and reports a bad argument as a `UserError`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import_all()
        _forget_arguments_on_class_change()
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parses a command line, on which `--config` may name a configuration that ships with svdd."""
        return super().parse_args(with_shipped_configs(sys.argv[1:] if args is None else args), *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError."""
        raise UserError(explain(message))


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns the errors that constructors raise about their arguments into `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(explain(str(error))) from error


def explain(message: str) -> str:
    """Returns the part of a parser's message that names the setting, the value given and what was expected.

    Args:
        message: jsonargparse's message; for a class setting it is a tree of all types that were tried.
    """
    setting = re.match(r'\s*Parser key "([^"]+)":?\s*', message)
    key, rest = (f"{setting[1]}: ", message[setting.end() :]) if setting else ("", message)
    name = setting[1] if setting else "model.CLASS"
    if foreign := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", message):
        option = re.split(r"\.(?:class_path|init_args)\b", foreign[2])[0]
        return (
            f"`svdd {foreign[1]}` has no setting {option!r}, remove it; `svdd {foreign[1]} --help` lists all settings"
        )
    if unknown := re.search(r"Expected a dot import path string: (\S+)", rest):
        return key + _unknown(name, unknown[1])
    if " is abstract" in rest and (
        path := re.search(r"(?:class, but|Given value: (?:{'class_path': ')?)\s*(\w+(?:\.\w+)+)", rest)
    ):
        module, _, cls = path[1].rpartition(".")
        return f"{key}class {path[1]!r} cannot be used: {missing_methods(getattr(import_module(module), cls))}"
    if option := re.search(r"Option '([^']+)' is not accepted", rest):
        return f"{key}no argument {option[1]!r}; `svdd predict --{name}.help NAME` lists what class NAME takes"
    if path := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", rest):
        return f"{key}class {path[1]!r} cannot be used: {path[2].strip()} (the working directory is searched for files)"
    if inner := re.search(r'Parser key "([^"]+)":?\s*(.*)', rest):
        return f"{name}.{inner[1]}: {_plain(inner[2])}"
    reasons = [line.strip(" -") for line in rest.splitlines() if line.strip(" -") and not _NOISE.search(line)]
    return key + _plain(" ".join(reasons) or rest)


def _unknown(key: str, name: str) -> str:
    kind = key.rsplit(".", 1)[-1].removeprefix("eval_").rstrip("s")
    if kind not in KINDS:
        return f"{name!r} is not a class path such as package.module.Class"
    known = names_of(kind)
    if name in known:
        return f"{kind} {name!r} cannot be used here: `svdd fit` trains a learned value, such as LatentConvValue"
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known)}{hint} (a class of your own: my_file.MyClass)"


def _plain(text: str) -> str:
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", lambda match: "one of " + match[1].replace("'", ""), text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return " ".join(text.replace("Expected a ", "expected ").replace(". Got value:", ", got").split())


def _forget_arguments_on_class_change() -> None:
    """Makes jsonargparse discard all arguments of a class that another class replaces.

    It would carry over those that both classes have, defaults included: `--model.sampler SMC` over a configuration with
    SVDD would give SMC SVDD's `num_particles: 1`, which guides nothing. No option turns this off.
    """
    name = "discard_init_args_on_class_path_change"
    if not hasattr(typehints, name):
        raise ImportError(
            f"jsonargparse {jsonargparse.__version__} lacks {name}, which svdd replaces; install a version that the "
            "requirements of svdd allow"
        )
    setattr(typehints, name, _discard_all)


def _discard_all(parser_or_action: Any, previous: Any, following: Any) -> None:
    if previous and "init_args" in previous and previous["class_path"] != following["class_path"]:
        previous["init_args"] = jsonargparse.Namespace()
