"""The short form of sums of rewards: `Aesthetic + 0.5 * CLIPScore` in place of a `WeightedSum` with its arguments."""

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args

from svdd import UserError, did_you_mean
from svdd.commands.registry import catalogue
from svdd.rewards.base import Reward

__all__ = ["expand", "expanded", "makes_rewards"]

_FORM = "a sum of rewards, such as 'Aesthetic + 0.5 * CLIPScore(pretrained=emoji-judge)'"
_SHORT = re.compile(r"(?=.*[*+/()-])[-+(\w].*")  # what is no name alone, and no YAML or JSON
_OTHER = re.compile(r"\.(ya?ml|json)$|^\w+:\s|\n")
_MOST = 10_000  # characters


def expanded(value: Any, typehint: Any = None) -> Any:
    """Returns a value for a setting of this type: `expand` of a text where a reward belongs; else the value."""
    takes_reward = isinstance(value, str) and Reward in (typehint, *get_args(typehint))
    return expand(value) if takes_reward else value


def expand(text: str) -> Any:
    """Returns the settings that a short form stands for: class_path and init_args; other texts as they are.

    Rewards are added and subtracted, and multiplied or divided by numbers. A reward is a name or a dotted path; its
    arguments stand in parentheses. They are Python literals, other rewards where the class takes one, or else text,
    which needs quotes only where Python's syntax does. Nothing in the text is evaluated as code.

    Raises:
        UserError: If the text is a short form with a mistake; the message says where it is.
    """
    text = text.strip()
    if not _SHORT.fullmatch(text) or _OTHER.search(text) or os.path.isfile(text):
        return text
    if len(text) > _MOST:
        raise UserError(f"{text[:60]!r}... has more than {_MOST} characters; write WeightedSum in a YAML file")
    try:
        tree = ast.parse(text, mode="eval").body
        terms = list(_terms(tree, text, 1.0))
    except (SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        hint = "; put quotes around a text that is no Python, such as a path" if "(" in text else ""
        if text.count("(") > text.count(")"):
            hint = "; in a list in brackets it needs quotes of its own, as its commas would separate elements"
        raise UserError(f"{text!r} cannot be read{place}; expected {_FORM}{hint}") from None
    except RecursionError:
        raise UserError(f"{text[:60]!r}... is nested too deeply; write WeightedSum in a YAML file") from None
    rewards, weights = [reward for reward, _ in terms], [weight for _, weight in terms]
    if weights == [1.0]:
        return rewards[0]
    arguments = {"rewards": rewards, "weights": weights}
    return {"class_path": "svdd.rewards.weighted_sum.WeightedSum", "init_args": arguments}


def makes_rewards(function: Any) -> bool:
    """Whether a function is annotated to return a reward, so that jsonargparse calls it with the arguments."""
    try:
        made = inspect.signature(function, eval_str=True).return_annotation
    except Exception:  # no signature, or an annotation for type checkers only
        return False
    return isinstance(made, type) and issubclass(made, Reward)


def _terms(node: ast.expr, text: str, weight: float) -> Iterator[tuple[dict[str, Any], float]]:
    """Yields the rewards of an expression, each with its weight."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as sign, right):
            yield from _terms(left, text, weight)
            yield from _terms(right, text, weight if isinstance(sign, ast.Add) else -weight)
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            yield from _terms(operand, text, -weight if isinstance(sign, ast.USub) else weight)
        case ast.BinOp(left, ast.Mult(), right) if (factor := _number(left)) is not None:
            yield from _terms(right, text, weight * factor)
        case ast.BinOp(left, ast.Mult(), right) if (factor := _number(right)) is not None:
            yield from _terms(left, text, weight * factor)
        case ast.BinOp(left, ast.Div(), right) if factor := _number(right):
            yield from _terms(left, text, weight / factor)
        case ast.Name() | ast.Attribute():
            yield {"class_path": _path(node, text)[0]}, weight
        case ast.Call(function, positional, keywords):
            yield _reward(function, positional, keywords, text), weight
        case _:
            found = ast.get_source_segment(text, node) or ""
            number = _number(node) is not None
            _fail(
                text, node, f"{found!r} is {'a number without a reward' if number else 'no reward'}; expected {_FORM}"
            )


def _reward(function: ast.expr, positional: list[ast.expr], keywords: list[ast.keyword], text: str) -> dict[str, Any]:
    """Returns class_path and init_args of a reward with arguments."""
    path, known = _path(function, text)
    taken = [name for name in _parameters(known) if name != "self"]
    if known is None or inspect.isclass(known) or makes_rewards(known):
        takes = f"{path} takes {', '.join(taken) or 'no arguments'}" if known else f"give {path} its arguments by name"
        names = taken
    else:  # a function that scores: its first arguments are the images and the prompts
        takes, names = f"give {path} its arguments by name", []
    if len(positional) > len(names):
        _fail(text, positional[len(names)], f"an argument without a name: {takes}")
    given = dict(zip(names, positional, strict=False))
    for keyword in keywords:
        if keyword.arg is None or keyword.arg in given:
            _fail(text, keyword.value, f"expected name=value once for each argument of {path}")
        if known and keyword.arg not in taken and taken:
            what = f"{path} has no argument {keyword.arg!r}; it takes {', '.join(taken)}"
            _fail(text, keyword, f"{what}{did_you_mean(keyword.arg, taken)}")
        given[keyword.arg] = keyword.value
    hints = _parameters(known)
    read = {name: _argument(value, text, hints.get(name) is Reward) for name, value in given.items()}
    return {"class_path": path, **({"init_args": read} if read else {})}


def _argument(node: ast.expr, text: str, is_reward: bool) -> Any:
    """Returns the value of an argument: a literal, the settings of a reward, or else the text itself."""
    segment = ast.get_source_segment(text, node) or ""
    if is_reward:
        inner = expand(segment)
        if isinstance(inner, str):
            _path(node, text)
        return inner
    try:
        return ast.literal_eval(node)
    except ValueError:
        return segment


def _path(node: ast.expr, text: str) -> tuple[str, Callable[..., Any] | None]:
    """Returns the name or dotted path of a reward, and its class or function, if it is known."""
    path = ast.get_source_segment(text, node) or ""
    if not all(part.isidentifier() for part in path.split(".")):
        _fail(text, node, f"{path!r} is no reward; expected {_FORM}")
    if "." in path:
        try:
            found = resolve_name(path)
        except Exception:  # a file of the user's may raise anything; jsonargparse reports it
            return path, None
        return path, found if callable(found) else None
    classes = [Reward]
    for each in classes:  # the list grows by the subclasses of each
        classes += each.__subclasses__()
    found = [each for each in classes if each.__name__ == path and not inspect.isabstract(each)]
    if not found:
        known = [entry.name for entry in catalogue() if entry.kind == "reward"]
        what = f"unknown reward {path!r}; known: {', '.join(known)}{did_you_mean(path, known)}"
        _fail(text, node, f"{what} (a class of your own: my_file.MyClass)")
    return path, found[0]


def _parameters(known: Callable[..., Any] | None) -> dict[str, Any]:
    """Returns the parameters of a class or function, each with its annotation; none if they are unknown."""
    try:
        parameters = inspect.signature(known, eval_str=True).parameters.values() if known is not None else ()
    except Exception:  # no signature, or an annotation for type checkers only
        return {}
    return {
        each.name: each.annotation for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }


def _number(node: ast.expr) -> float | None:
    """Returns the value of a number, or of products and quotients of numbers; None for anything else."""
    match node:
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.UnaryOp(ast.USub(), operand) if (inner := _number(operand)) is not None:
            return -inner
        case ast.BinOp(left, ast.Mult() | ast.Div() as sign, right):
            first, second = _number(left), _number(right)
            if first is not None and second is not None and (second or isinstance(sign, ast.Mult)):
                return first * second if isinstance(sign, ast.Mult) else first / second
    return None


def _fail(text: str, node: Any, what: str) -> NoReturn:
    raise UserError(f"in {text!r}, character {node.col_offset + 1}: {what}")
