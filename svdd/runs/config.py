"""The configuration that a run folder records, and what may change in it when the run continues."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from svdd.runs.files import write_atomically
from svdd.runs.secrets import redacted
from svdd.runs.yaml_text import read_yaml

__all__ = [
    "CONFIG",
    "HARMLESS",
    "HARMLESS_IF_REPRODUCIBLE",
    "Recorded",
    "differences",
    "is_older",
    "leaves",
    "plain",
    "read_config",
    "write_config",
]

CONFIG = "config.yaml"
_HEADER = re.compile(r"# svdd (\w+): ")  # begins the file, which marks the folder as the output of that command

# Settings that do not change a run's images and rows.
HARMLESS = re.compile(
    r"trainer(\.(?!precision(\.|$)).*)?"
    r"|(output|overwrite|patience|step_timeout|max_restarts|tar|evaluation)(\..*)?"
    r"|(data\.num_workers|model\.on_error)(\..*)?"
)
_CONNECTION = {"endpoint", "url", "api_key_env", "headers_env", "timeout", "retries", "backoff", "concurrency"}
_SOURCE = re.compile(r"data\.(prompts|limit|prompt_column|max_prompt_length)(\..*)?")  # where prompts come from
HARMLESS_IF_REPRODUCIBLE = re.compile(rf"{HARMLESS.pattern}|(data\.batch_size|model\.diffusion\.chunk_size)(\..*)?")


class Recorded(NamedTuple):
    """What an output folder says about itself."""

    kind: str  # the name of the command that wrote it
    config: dict[str, Any]  # its configuration; {} if the file was damaged


def write_config(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Records a command and its configuration in the output folder."""
    write_atomically(folder / CONFIG, f"# svdd {kind}: the full resolved configuration\n{_dump(config)}".encode())


def read_config(folder: Path) -> Recorded | None:
    """Returns what an output folder records; None if svdd recorded nothing there."""
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not (header := _HEADER.match(text)):
        return None
    config = None
    with suppress(yaml.YAMLError, ValueError):
        config = read_yaml(text)
    return Recorded(header[1], config if isinstance(config, dict) else {})


def is_older(config: Mapping[str, Any]) -> bool:
    """Whether an earlier version of svdd recorded a configuration, together with what follows from it."""
    data = config.get("data")
    return "rows_at_once" in config or (isinstance(data, dict) and "prompts_sha256" in data)


def differences(
    recorded: Mapping[str, Any],
    config: Mapping[str, Any],
    harmless: re.Pattern[str] = HARMLESS,
    prompts_known: bool = False,
) -> list[str]:
    """Lists the settings that differ, with both values.

    Settings whose dotted keys match `harmless` may differ, by default those that do not affect a run's images, and so
    may those by which a reward of svdd reaches its server. With `prompts_known` so may those that say where the prompts
    come from, as the prompts themselves are compared.
    """
    there, now = (leaves(_unconnected(yaml.safe_load(_dump(tree)))) for tree in (recorded, config))
    return [
        f"{key} was {there.get(key, 'not set')!r}, now {now.get(key, 'not set')!r}"
        for key in dict.fromkeys((*there, *now))
        if not harmless.fullmatch(key) and (key not in there or key not in now or there[key] != now[key])
        if not (prompts_known and _SOURCE.fullmatch(key))
    ]


def leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a configuration by dotted key, without `init_args` in the key."""
    return dict(_leaves(config))


def plain(value: Any, finite: bool = False) -> Any:
    """Reduces a value to dicts, lists, strings, numbers, booleans and None, as in YAML and JSON.

    Tensors and arrays become (lists of) numbers, unknown objects strings, and with `finite` NaN and infinities None.
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


def _dump(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(redacted(plain(config)), sort_keys=False, allow_unicode=True)


def _unconnected(tree: Any) -> Any:
    """Returns a configuration without the settings by which objects of svdd reach a server, which may move."""
    if isinstance(tree, list):
        return [_unconnected(branch) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {name: _unconnected(branch) for name, branch in tree.items()}
    if str(kept.get("class_path")).startswith("svdd.") and isinstance(arguments := kept.get("init_args"), dict):
        kept["init_args"] = {name: value for name, value in arguments.items() if name not in _CONNECTION}
    return kept


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and the value of each leaf, without `init_args` in the key."""
    if isinstance(tree, dict) and tree:
        for name, branch in tree.items():
            yield from _leaves(branch, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif key:
        yield key, tree
