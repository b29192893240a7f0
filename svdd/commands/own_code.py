"""A user's own classes and functions: how dotted paths on a command line and in YAML name them, and their errors."""

import inspect
import sys
from collections.abc import Mapping
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jsonargparse
import jsonargparse._actions as actions
import jsonargparse._typehints as typehints

from svdd import UserError, did_you_mean, first_line
from svdd.commands.reward_sums import expanded, makes_rewards
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward, is_device_failure
from svdd.rewards.function import FunctionReward, import_path
from svdd.runs.tracebacks import users_traceback
from svdd.samplers.base import Sampler
from svdd.values.base import Value

__all__ = ["adapt_anew", "discard_all", "own_error", "resolve_help"]

_KINDS = (Reward, Sampler, Value, Diffusion)
_FUNCTION_REWARD = f"{FunctionReward.__module__}.{FunctionReward.__name__}"


_PARAMETERS = inspect.signature(FunctionReward).parameters


def own_error(error: Exception) -> UserError | None:
    """Returns what the user can fix: an error in code of their own, unless the device has failed; None for others."""
    if is_device_failure(error) or not users_traceback(error):
        return None
    return UserError(f"{type(error).__name__}: {first_line(error)}")


def discard_all(parser_or_action: Any, previous: Any, following: Any) -> None:
    """Discards all arguments of a class that another replaces: SMC must not keep SVDD's default of one particle.

    So does another function of a `FunctionReward`. A model keeps what was set before its family was named, or left
    open: `AutoDiffusion` has the arguments of all.
    """
    if not previous or "init_args" not in previous:
        return
    function = getattr(following.get("init_args"), "function", None)
    another = function is not None and previous["init_args"].get("function") != function
    if previous["class_path"] != following["class_path"] or another:
        kept = previous["init_args"].items() if _names_a_family(previous, following) else ()
        previous["init_args"] = jsonargparse.Namespace(**{name: value for name, value in kept if value is not None})


def _names_a_family(previous: Any, following: Any) -> bool:
    """Returns whether one class is `AutoDiffusion` and the other one of its families."""
    from svdd.diffusion.latent import LatentDiffusion

    paths = [str(part["class_path"]) for part in (previous, following)]
    if not any(path.rpartition(".")[2] == "AutoDiffusion" for path in paths):
        return False
    found = [resolve_name(path) for path in paths]
    return all(isinstance(each, type) and issubclass(each, LatentDiffusion) for each in found)


_adapt: Any = typehints.adapt_typehints


def adapt_anew(value: Any, typehint: Any, *args: Any, **options: Any) -> Any:
    """Reads a value as jsonargparse does, with four exceptions.

    A whole list replaces an earlier one, of which its elements keep no arguments. A single class or word where a list
    of them belongs is appended. Where a reward belongs, a sum in the short form becomes a `WeightedSum`, and a function
    a `FunctionReward`.
    """
    if isinstance(value, str | Mapping) and _takes_a_list(typehint):
        options["append"] = True
    if isinstance(value, list) and not options.get("append") and isinstance(options.get("prev_val"), list):
        options["prev_val"] = None
    value = expanded(value, typehint)
    kind = next((each for each in (typehint, *get_args(typehint)) if each in _KINDS), None)
    if kind is not None and (path := _path(value)) is not None and _import(path, kind) is not None:
        given = {} if isinstance(value, str) else dict(value.get("init_args") or {})
        own = {name: argument for name, argument in given.items() if name not in _PARAMETERS}
        if own:  # the function's, as in `my_file.my_function(scale=2)`
            given = {
                **{k: v for k, v in given.items() if k not in own},
                "arguments": own | (given.get("arguments") or {}),
            }
        value = {"class_path": _FUNCTION_REWARD, "init_args": {"function": path, **given}}
    return _adapt(value, typehint, *args, **options)


def _takes_a_list(typehint: Any) -> bool:
    """Returns whether a type is a list of classes or known words, perhaps also one of them, but no text or number."""
    members = {*_members(typehint)}
    elements = {each for member in members if get_origin(member) is list for each in _members(*get_args(member))}
    return bool(elements) and not {str, int, float, bool, Any} & (members | elements)


def _members(typehint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the type itself."""
    return get_args(typehint) if get_origin(typehint) in (Union, UnionType) else (typehint,)


_resolve_help: Any = actions._ActionHelpClassPath.resolve_help_type


def resolve_help(action: Any, value: Any, option: str) -> Any:
    """Returns the class whose arguments `--model.reward.help NAME` shows; for a function that of `FunctionReward`."""
    if Reward in action._help_types and (path := _path(value)) is not None and _import(path, Reward) is not None:
        value = _FUNCTION_REWARD
    return _resolve_help(action, value, option)


def _path(value: Any) -> str | None:
    """Returns the dotted path of a class or a function in a setting; None if there is none."""
    path = value.get("class_path") if isinstance(value, Mapping | jsonargparse.Namespace) else value
    dotted = isinstance(path, str) and "." in path and all(part.isidentifier() for part in path.split("."))
    return path if dotted else None


def _import(path: str, kind: type) -> Any:
    """Imports what a path names; returns it if a reward belongs there and it is a function that gives scores.

    Raises:
        ValueError: If it is not there, or its file cannot be imported; jsonargparse adds the setting's name.
    """
    try:
        found = import_path(path)
    except ModuleNotFoundError as error:
        if f"{path}.".startswith(f"{error.name}."):
            return None  # jsonargparse says so, if it is no file's name either
        raise _problem(path, f"{type(error).__name__}: {first_line(error)}") from error
    except AttributeError as error:
        inside = users_traceback(error)
        why = f"AttributeError: {first_line(error)}" if inside else f"{first_line(error)}{_nearest(path)}"
        raise _problem(path, why) from error
    except Exception as error:
        raise _problem(path, f"{type(error).__name__}: {first_line(error)}") from error
    if kind is not Reward or isinstance(found, kind) or (isinstance(found, type) and issubclass(found, kind)):
        return None
    if isinstance(found, type):
        advice = "derive it from svdd.rewards.Reward, or name a function in its place"
        raise _problem(path, f"it is not a subclass of Reward; {advice}")
    if not callable(found):
        raise _problem(path, f"it is a {type(found).__name__}; expected a class or a function")
    return None if makes_rewards(found) else found


def _problem(path: str, what: str) -> ValueError:
    """Returns an error in jsonargparse's words, which `explain` reads."""
    return ValueError(f"Problem with given class_path {path!r}: {what}")


def _nearest(path: str) -> str:
    """Returns a hint at the most similar class or function of the module."""
    holder, _, name = path.rpartition(".")
    members = vars(sys.modules.get(holder, object))
    return did_you_mean(name, [each for each, value in members.items() if callable(value) and each[0] != "_"])
