"""Passwords and keys in settings: refused where they do not belong, and never written or shown."""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from svdd import UserError

__all__ = ["redact", "redacted", "refuse_secrets"]

_TOKEN = r"\b(?:sk-|pk-|hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|nvapi-|r8_|AKIA|AIza|eyJ)[\w.-]{12,}"
_SHAPES = (  # a group that stays, and what is a secret by its form
    re.compile(r"([a-z][a-z0-9+.-]*://)[^/?#\s'\"]*(?:@|%40)", re.I),
    re.compile(r"([?&#;][\w.-]*(?:key|token|secret|passw|auth|sig|credential)[\w.-]*=)[^&#\s'\"]+", re.I),
    re.compile(r"(\bauthorization['\"]?\s*[:=]\s*)\S.*", re.I),
    re.compile(r"(\bbearer\s+)[\w.~+/=-]{16,}", re.I),
    re.compile(f"(){_TOKEN}"),
)
_NAME = re.compile(r"(?:.*[_.-])?(?:api_?key|password|passwd|secret|token|authorization|credentials?)", re.I)
_DONE = re.compile(r".*\*\*\*.* \([0-9a-f]{4}\)", re.S)
_PLAIN_ADDRESS = re.compile(r"https?://(?!.*(?:[@?#\s]|%40))[^/]+(/.*)?", re.I)
_HOLDS_SECRET = re.compile(r"(?:.*_)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.I)  # a variable's name
_LEAST = 8  # characters of a variable's value that is taken for a secret
_VARIABLE = re.compile(r"[A-Z]+(?:_[A-Z0-9]+)+")  # may be shown


def redact(text: str) -> str:
    """Returns a text with `***` in place of what has the form of a password or a key, or is one in the environment."""
    for shape in _SHAPES:
        text = shape.sub(r"\1***", text)
    for name, value in os.environ.items():
        if len(value) >= _LEAST and value in text and _HOLDS_SECRET.fullmatch(name):
            text = text.replace(value, "***")
    return text


def redacted(tree: Any, name: str = "") -> Any:
    """Returns plain settings without secrets, by their form or name; a few hexadecimal digits show whether one changed.

    Args:
        tree: Dicts, lists, strings, numbers, booleans and None.
        name: The key under which the tree stands.
    """
    if isinstance(tree, Mapping):
        named = name.endswith("headers_env")  # holds names of variables
        return {key: redacted(branch, name if named else str(key)) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [redacted(branch, name) for branch in tree]
    if not isinstance(tree, str) or _DONE.fullmatch(tree):
        return tree
    shown = "***" if tree and _NAME.fullmatch(name) else redact(tree)
    return tree if shown == tree else f"{shown} ({hashlib.sha256(tree.encode(errors='replace')).hexdigest()[:4]})"


def refuse_secrets(tree: Any, name: str = "") -> None:
    """Raises a UserError, which does not repeat it, for a key where the name of a variable belongs, and for a password.

    The settings `api_key_env`, `headers_env` and `endpoint` are checked, whatever class they belong to, and those named
    `url` for what has the form of a secret.
    """
    if isinstance(tree, Mapping | list):
        for key, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            refuse_secrets(branch, f"{name}.{key}".removesuffix(".init_args").lstrip("."))
    elif not isinstance(tree, str):
        return
    elif re.search(r"(api_key_env|headers_env\.[^.]+)$", name) and not os.environ.get(tree, "").strip():
        given = tree if _VARIABLE.fullmatch(tree) else "of the given name"
        expected = f"{name} takes the name of an environment variable that holds the key, not the key"
        raise UserError(f"{expected}: no variable {given} is set")
    elif (name.endswith("endpoint") and not _PLAIN_ADDRESS.fullmatch(tree)) or (
        re.search(r"(^|\.)url$", name) and redact(tree) != tree
    ):
        problem = f"{name} must be an address such as http://localhost:8000/v1, without a user, a password or a query"
        raise UserError(f"{problem}, which a run would save; give a key in the variable that api_key_env names")
