"""Rewards as a visitor types them: registered classes with numbers; no module is imported and no file is read."""

import ast
import math
import re
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args, get_origin

from svdd import UserError, did_you_mean
from svdd.commands.app.controls import MAX_COUNT, named_class, parameters_of
from svdd.commands.reward_sums import expand
from svdd.rewards.base import Reward
from svdd.rewards.weighted_sum import WeightedSum

__all__ = ["Allowed", "checked_reward", "in_short", "values_in"]

Allowed = frozenset[tuple[str, str, str]]  # class, argument and its value, as text, that the page's owner has named

_MOST = 500  # characters
_SUM = f"{WeightedSum.__module__}.{WeightedSum.__name__}"
_SHIPPED: Allowed = frozenset(("CLIPScore", "pretrained", repr(name)) for name in ("emoji", "emoji-judge"))


def checked_reward(text: Any, names: Collection[str], allowed: Allowed) -> dict[str, Any]:
    """Returns the settings of a reward, or of a sum of rewards, that a visitor typed.

    Args:
        text: What was typed, in the short form.
        names: The rewards that a visitor may name.
        allowed: Values of arguments that a visitor may give besides numbers, switches and choices of the class.

    Raises:
        UserError: If it names anything else.
    """
    if not isinstance(text, str) or not (text := text.strip()):
        raise UserError("the reward is empty; expected a name, or a sum such as 'Brightness + 0.5 * CLIPScore'")
    if len(text) > _MOST:
        raise UserError(f"the reward has {len(text)} characters; the page takes at most {_MOST}")
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
        raise UserError(f"the reward {text!r} cannot be read: {why}") from None
    if dotted := next((node for node in nodes if isinstance(node, ast.Attribute)), None):
        found = ast.get_source_segment(text, dotted)
        raise UserError(f"reward {found!r}: the page takes registered rewards only: {', '.join(sorted(names))}")
    read = expand(text)
    settings = {"class_path": read} if isinstance(read, str) else read
    _check(settings, names, allowed | _SHIPPED)
    return settings


def in_short(settings: Any) -> str:
    """Returns the short form of a reward's settings."""
    if isinstance(settings, str):
        return settings
    name, given = _name(settings), settings.get("init_args") or {}
    if name == "WeightedSum" and given.keys() <= {"rewards", "weights"}:
        weights = given.get("weights") or [1.0] * len(given["rewards"])
        terms = zip(weights, given["rewards"], strict=True)
        return " + ".join(f"{weight:g} * {in_short(reward)}" for weight, reward in terms).replace("+ -", "- ")
    written = ", ".join(f"{key}={_literal(value)}" for key, value in given.items() if value is not None)
    return f"{name}({written})" if written else name


def values_in(settings: Any) -> Iterator[tuple[str, str, str]]:
    """Yields class, argument and value of all arguments in a reward's settings, also of the rewards within."""
    if isinstance(settings, dict) and "class_path" in settings:
        for argument, value in (settings.get("init_args") or {}).items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield from values_in(each)
                else:
                    yield _name(settings), argument, repr(each)


def _literal(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return in_short(value)
    is_word = isinstance(value, str) and re.fullmatch(r"(?!(True|False|None)$)[A-Za-z_]\w*(-[A-Za-z_]\w*)*", value)
    return value if is_word else repr(value)


def _name(settings: Any) -> str:
    """Returns the name of a class of svdd; a path to another stays whole, as that class may have the same name."""
    path = str(settings["class_path"])
    return path.rpartition(".")[2] if path.startswith("svdd.") else path


def _check(settings: dict[str, Any], names: Collection[str], allowed: Allowed) -> None:
    path, name = settings["class_path"], _name(settings)
    if path != _SUM and (path != name or name not in names):
        raise UserError(
            f"unknown reward {path!r}; the page takes {', '.join(sorted(names))}{did_you_mean(name, names)}"
        )
    given = settings.get("init_args") or {}
    if settings.keys() - {"class_path", "init_args"} or not isinstance(given, dict):  # jsonargparse reads more
        raise UserError(f"{name}: expected class_path and a mapping init_args, got {str(settings)[:80]}")
    known = named_class("reward", name)
    parameters = parameters_of(known)
    if lacking := [each.name for each in parameters if each.default is each.empty and each.name not in given]:
        raise UserError(f"{name} needs {' and '.join(lacking)}, as in {name}({lacking[0]}=...)")
    hints = {each.name: each.annotation for each in parameters}
    for argument, value in given.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and hints.get(argument) is Reward:
                _check({"class_path": each}, names, allowed)
            elif isinstance(each, dict) and "class_path" in each:
                _check(each, names, allowed)
            elif not _harmless(each, hints.get(argument)) and (name, argument, repr(each)) not in allowed:
                what = f"{name}: the page does not take {argument}={str(each)[:40]!r}"
                raise UserError(f"{what}; it takes numbers up to {MAX_COUNT}, true, false and the choices of the class")


def _harmless(value: Any, hint: Any) -> bool:
    if isinstance(value, str):
        choices = [each for each in (hint, *get_args(hint)) if get_origin(each) is Literal]
        return any(value in get_args(each) for each in choices)
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= MAX_COUNT
    return value is None
