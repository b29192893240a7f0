"""The arguments of a class as controls of a page, from its constructor's signature and its docstring."""

import inspect
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import docstring_parser

from svdd import UserError
from svdd.commands.registry import KINDS
from svdd.values.learned import LearnedValue

__all__ = [
    "MAX_COUNT",
    "Control",
    "arguments",
    "checked_number",
    "controls_of",
    "named_class",
    "offered",
    "parameters_of",
]

MAX_COUNT = 1_000  # of candidates, particles, steps or whatever else an integer counts
MAX_NUMBER = 1e6


class Control(NamedTuple):
    """One argument of a constructor."""

    name: str
    kind: Literal["integer", "number", "switch", "choice", "text"]  # text: a number or one of the choices
    default: Any
    optional: bool  # whether it may be None
    choices: tuple[str, ...]
    help: str


def named_class(kind: str, name: str) -> type:
    """Returns a registered class; it must be listed by `catalogue`."""
    package, base = KINDS[kind]
    if (found := getattr(import_module(package), name, None)) is not None:
        return found
    classes = [getattr(import_module(f"{package}.base"), base)]  # a plug-in's
    for each in classes:  # the list grows by the subclasses of each
        classes += each.__subclasses__()
    return next(each for each in classes if each.__name__ == name)


def offered(kind: str, name: str) -> bool:
    """Returns whether a visitor can build a class without a file and without naming another class."""
    known = named_class(kind, name)
    required = [each for each in parameters_of(known) if each.default is each.empty]
    return not required and not issubclass(known, LearnedValue)


def parameters_of(known: type) -> list[inspect.Parameter]:
    """Returns the parameters of a constructor; those of one that takes anything, as PyTorch's, are none."""
    every = inspect.signature(known, eval_str=True).parameters.values()
    return [each for each in every if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def controls_of(known: type) -> list[Control]:
    """Returns a control for each argument that is a number, a switch or a choice; texts may name files and get none."""
    helps = {each.arg_name: each.description for each in docstring_parser.parse(known.__doc__ or "").params}
    found = []
    for each in parameters_of(known):
        kinds = _alternatives(each.annotation)
        choices = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
        names: dict[Any, Any] = {bool: "switch", int: "integer", float: "number"}
        kind: Any = next((names[kind] for kind in kinds if kind in names), "choice" if choices else None)
        if kind is not None:
            text = " ".join((helps.get(each.name) or "").split())
            kind = "text" if choices and kind != "choice" else kind
            found.append(Control(each.name, kind, each.default, type(None) in kinds, choices, text))
    return found


def arguments(known: type, given: Sequence[Any], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that differ from a class's defaults, from one value for each of its controls.

    An argument without a control stays as it was configured, and so does a schedule where the control is left empty.

    Raises:
        UserError: If a value is of another type or out of bounds.
    """
    controls = controls_of(known)
    if len(given) != len(controls):
        raise UserError(f"{known.__name__} has {len(controls)} controls, got {len(given)} values; reload the page")
    found = dict(configured)
    for control, value in zip(controls, given, strict=True):
        if isinstance(found.get(control.name), list | dict) and value in (None, "", found[control.name]):
            continue
        found[control.name] = _read(control, value)
        if found[control.name] == control.default:
            del found[control.name]
    return found


def checked_number(name: str, value: Any, least: float, most: float, whole: bool) -> Any:
    """Returns a number as an int or a float; UserError if it is none, or out of bounds."""
    expected = f"{name} must be {'a whole number' if whole else 'a number'} from {least:g} to {most:g}"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not least <= number <= most or (whole and not number.is_integer()):
        raise UserError(f"{expected}, got {str(value)[:40]!r}")
    return int(value) if whole else number


def _read(control: Control, value: Any) -> Any:
    if control.optional and value in (None, ""):
        return None
    if control.kind == "switch" and isinstance(value, bool):
        return value
    if control.choices and isinstance(value, str) and value.strip() in control.choices:
        return value.strip()
    if control.kind in ("switch", "choice"):
        expected = ", ".join(control.choices) or "true or false"
        raise UserError(f"{control.name}: expected {expected}, got {str(value)[:40]!r}")
    whole = control.kind == "integer"
    most = MAX_COUNT if whole else MAX_NUMBER
    try:
        return checked_number(control.name, value, -most, most, whole)
    except UserError as error:
        words = f", or {', '.join(control.choices)}" if control.choices else ""
        raise UserError(str(error).replace(", got", f"{words}, got", 1)) from None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
