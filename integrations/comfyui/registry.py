"""Rewards and samplers by name, from the arguments that a workflow states.

A workflow may come from a stranger. Only registered classes are made, their arguments are plain values, and no name is
imported that a workflow contains.
"""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from svdd import UserError, did_you_mean
from svdd.commands.registry import catalogue, import_all
from svdd.rewards.base import Reward
from svdd.runs.yaml_text import read_yaml
from svdd.samplers.base import Sampler

__all__ = ["build", "names"]

_BASES: dict[str, Any] = {"reward": Reward, "sampler": Sampler}
_LEFT_OUT = {"FunctionReward", "WeightedSum"}  # calls any function that a text names; is the input `plus`
_SERVERS = {"url", "endpoint"}  # arguments that name a server, to which images and the key of a variable are sent
_ALLOW_SERVERS = "SVDD_COMFYUI_SERVERS"


def names(kind: str) -> list[str]:
    """Returns the selectable classes of a kind of `KINDS`, built-in ones and those of plug-ins."""
    return [entry.name for entry in catalogue() if entry.kind == kind and entry.name not in _LEFT_OUT]


def build(kind: str, name: str, text: str, given: Mapping[str, Any]) -> Any:
    """Returns an object of a registered class, with the arguments of a YAML or JSON text and of other inputs.

    Raises:
        UserError: If the class or an argument is unknown, out of range, or names a server that is not allowed.
    """
    found = read_yaml(text) if text.strip() else {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"arguments must be YAML or JSON with names, such as 'num_candidates: 8', got {text!r}")
    if twice := found.keys() & given.keys():
        raise UserError(f"{name}: {twice.pop()!r} is given twice; leave it out of the arguments, or the input at 0")
    kind_of = _find(kind, name)
    known = list(inspect.signature(kind_of).parameters)
    if unknown := [each for each in (*found, *given) if each not in known]:
        takes = ", ".join(known) or "no arguments"
        raise UserError(f"{name} has no argument {unknown[0]!r}{did_you_mean(unknown[0], known)}; it takes {takes}")
    if found.keys() & _SERVERS and os.environ.get(_ALLOW_SERVERS) != "1":
        raise UserError(
            f"{name} would send images to a server that the workflow names; allow it with {_ALLOW_SERVERS}=1"
        )
    try:
        return kind_of(**found, **given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def _find(kind: str, name: str) -> Any:
    if name not in (known := names(kind)):
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
    import_all()
    classes = [_BASES[kind]]
    for each in classes:  # the list grows by the subclasses of each
        classes += each.__subclasses__()
    return next(each for each in classes if each.__name__ == name)
