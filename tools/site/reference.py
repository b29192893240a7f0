"""The generated pages of the reference: classes, commands and configurations."""

import io
import json
import os
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from inspect import isclass
from typing import Any
from unittest.mock import patch

from svdd.__main__ import _COMMANDS, main
from tools.site.repository import ROOT

__all__ = ["pages", "public_classes", "public_names"]

_PACKAGES = {  # what users import from: the title of its page
    "svdd": "svdd",
    "svdd.samplers": "Samplers",
    "svdd.values": "Values",
    "svdd.rewards": "Rewards",
    "svdd.diffusion": "Models",
    "svdd.state": "State",
    "svdd.evaluation.metrics": "Metrics",
}


def pages() -> dict[str, str]:
    """Returns the text of each generated page by its address."""
    made = {f"reference/classes/{package.rpartition('.')[2]}.md": _classes(package) for package in _PACKAGES}
    return made | {"reference/commands.md": _commands(), "reference/configs.md": _configs()}


@cache
def public_names() -> dict[str, Any]:
    """Returns everything that users import, by its name."""
    return {
        f"{package}.{export}": getattr(import_module(package), export)
        for package in _PACKAGES
        for export in import_module(package).__all__
    }


@cache
def public_classes() -> dict[str, str]:
    """Returns the name that users import for each public class, by the name of its definition."""
    return {_definition(found): name for name, found in public_names().items() if isclass(found)}


def _classes(package: str) -> str:
    """Returns the page of a package: base classes, then the others, then functions and constants."""
    title, own = _PACKAGES[package], {}
    for name, found in public_names().items():
        elsewhere = isclass(found) and public_classes()[_definition(found)] != name
        if name.rpartition(".")[0] == package and not elsewhere and name not in _PACKAGES:
            own[name] = found
    lines = [f"---\ntitle: {title}\n---", f"::: {package}"]
    lines += [*_options(heading=title, heading_level=1, members=False), ""]
    bases = {name for name, found in own.items() if _definition(found).startswith(f"{package}.base.")}
    for name in sorted(own, key=lambda name: (not isclass(own[name]), name not in bases, name)):
        inherits = isclass(own[name]) and "__init__" not in vars(own[name]) and _inherits_public(own[name])
        lines += [f"::: {name}", *(_options(merge_init_into_class=False) if inherits else []), ""]
    return "\n".join(lines)


def _options(**options: str | int) -> list[str]:
    return ["    options:", *(f"      {name}: {json.dumps(value)}" for name, value in options.items())]


def _definition(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


def _inherits_public(cls: type) -> bool:
    """Whether the constructor is that of another public class, whose entry describes its arguments."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return _definition(owner) in public_classes()


def _commands() -> str:
    """Returns the page of the command line, with the help that each command prints."""
    lines = ["# Commands", "", "What each command prints with `--help`."]
    for words in ([], *([name] for name in _COMMANDS if name != "list")):
        lines += ["", f"## {' '.join(['svdd', *words])}", "", "```text", _help(words).rstrip(), "```"]
    return "\n".join([*lines, ""])


def _help(words: list[str]) -> str:
    with patch.dict(os.environ, COLUMNS="80"), redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        main([*words, "--help"])
    return re.sub(".\b", "", printed.getvalue())  # a character that the next one erases


def _configs() -> str:
    """Returns the page of the configurations that ship with svdd: each file as it is, with its comments."""
    lines = ["# Configurations", "", "They ship with svdd: `--config NAME`, or a path. Studies: `svdd study NAME`."]
    folder = ROOT / "configs"
    for group in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        name = group.name
        lines += ["", "## Runs" if group == folder else f"## {name} {{ #{name} }}"]
        for path in sorted(group.glob("*.yaml")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            lines += ["", f"### {name} {{ #{name.replace('/', '-')} }}", ""]
            lines += ["```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join([*lines, ""])
