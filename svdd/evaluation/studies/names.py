"""Names in a study: of its runs, made from their settings, and of rewards."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from svdd import UserError

__all__ = ["as_text", "folder_name", "labels", "reward_pairs", "shortened"]

_MOST_NAME = 80


def labels(settings: Mapping[str, Any]) -> list[str]:
    """Returns `alpha=0.0` for each setting, with as much of its key as tells it from the others."""
    lasts = [key.rpartition(".")[2] for key in settings]
    shown = [key if lasts.count(last) > 1 else last for key, last in zip(settings, lasts, strict=True)]
    return [f"{key}={_value(value)}" for key, value in zip(shown, settings.values(), strict=True)]


def _value(value: Any) -> str:
    """Returns a setting as a part of a label: a class by its name and arguments."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = value.get("init_args") or {}
        inner = ",".join(f"{name}={_value(given)}" for name, given in arguments.items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({inner})" if inner else "")
    if isinstance(value, list):
        return "+".join(map(_value, value))
    return as_text(value)


def folder_name(label: str, taken: set[str]) -> str:
    """Returns a name that is valid as a folder's on any system, and new, also where case does not count."""
    name = re.sub(r"_{2,}", "_", re.sub(r"[^\w.=+-]", "_", label, flags=re.ASCII)).strip("_. ") or "run"
    if name != name[:_MOST_NAME] or name.lower() in taken:
        name = f"{name[:_MOST_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    if name.lower() in taken:
        raise UserError(f"two runs are called {label!r}; give the variants other names")
    return name


def as_text(value: Any) -> str:
    """Returns a setting as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(value: Any) -> str:
    """Returns a value for an error message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reward_pairs(tree: Any) -> tuple[tuple[str, str], ...]:
    """Returns pairs of names out of a list of them, or out of one pair."""
    pairs = [tree] if isinstance(tree, list) and tree and isinstance(tree[0], str) else tree or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or not all(isinstance(name, str) for name in pair) or len({*pair}) != 2:
            expected = "pairs of two rewards, such as [[Compressibility, CLIPScore]]"
            raise UserError(f"fronts must be {expected}, got {shortened(tree)}")
    return tuple((x, y) for x, y in pairs)
