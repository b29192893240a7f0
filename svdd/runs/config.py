"""The configuration that a run folder records, and what may change in it when the run continues."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import yaml

__all__ = ["HEADER", "differences", "dump_config", "load_config", "plain"]

HEADER = "# svdd run"

# What does not change the images and rows of a run, beyond float rounding.
_HARMLESS = re.compile(
    r"trainer(\.(?!precision(\.|$)).*)?"
    r"|(output|overwrite|patience|max_restarts|tar|evaluation|data\.(batch_size|num_workers))(\..*)?"
    r"|model\.(on_error|diffusion\.(chunk_size|compile))(\..*)?"
)


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Encodes a configuration as the YAML file of a run folder, recognisable by its first line."""
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    return f"{HEADER}: the full resolved configuration\n{text}".encode()


def load_config(text: str) -> dict[str, Any]:
    """Decodes what `dump_config` wrote; a file that was edited into something else reads as an empty one."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def differences(
    recorded: Mapping[str, Any], config: Mapping[str, Any], harmless: re.Pattern[str] = _HARMLESS
) -> list[str]:
    """Lists the settings that differ and bear on what a run makes, with both values.

    Args:
        recorded: What `load_config` returned.
        config: The configuration now.
        harmless: Matches the dotted keys that bear on nothing; by default those of a run that draws images.
    """
    there, now = (dict(_leaves(load_config(dump_config(tree).decode()))) for tree in (recorded, config))
    return [
        f"{key} was {there.get(key, 'not set')!r}, now {now.get(key, 'not set')!r}"
        for key in dict.fromkeys((*there, *now))
        if not harmless.fullmatch(key) and (key not in there or key not in now or there[key] != now[key])
    ]


def plain(value: Any, finite: bool = False) -> Any:
    """Reduces a value to dicts, lists, strings, numbers, booleans and None, as YAML and JSON know them.

    Args:
        value: Anything; tensors and arrays become (lists of) numbers, what is unknown becomes its string.
        finite: Replace NaN and infinities by None, as strict JSON asks for.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(entry, finite) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry, finite) for entry in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return None if finite and not math.isfinite(value) else float(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), finite)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and the value of each leaf; `init_args` is left out of the key."""
    if isinstance(tree, dict) and tree:
        for name, branch in tree.items():
            yield from _leaves(branch, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif key:
        yield key, tree
