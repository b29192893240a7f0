"""The settings of an object as plain data that files can store and compare."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["settings"]

# Arguments that do not change the result; the second line's are those of an endpoint.
_NO_EFFECT = {"self", "batch_size", "local_files_only", "one_by_one"}
_NO_EFFECT |= {"api_key_env", "backoff", "concurrency", "retries", "timeout"}


def settings(thing: Any) -> dict[str, Any]:
    """Returns the constructor's arguments whose attributes of the same name hold plain data.

    Folders and files are reduced to their last part, so that they can be moved; an object with an `identity`, to that.
    """
    names = [name for name in inspect.signature(type(thing).__init__).parameters if name not in _NO_EFFECT]
    found = {name: _plain(getattr(thing, name)) for name in names if hasattr(thing, name)}
    return {name: value for name, value in found.items() if value is not ...}


def _plain(value: Any) -> Any:
    """Returns the value as JSON data, or an ellipsis if it has no such form."""
    if hasattr(value, "identity"):
        return value.identity
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        return path.name if path.exists() else str(value)
    if isinstance(value, list | tuple | nn.ModuleList):
        parts = [_plain(part) for part in value]
        return ... if ... in parts else parts
    return f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) else ...
