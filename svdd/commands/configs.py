"""The configurations that ship with svdd: `--config quickstart` works in any directory."""

import re
from collections.abc import Sequence
from pathlib import Path

from svdd import UserError, nearest

__all__ = ["with_shipped_configs"]

_PACKAGE = Path(__file__).parents[1]


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Replaces the names of shipped configurations on a command line by their paths.

    A name has letters, digits, `_` and `-`, and may end in `.yaml`. A file of that name in the working directory wins.

    Args:
        words: The command line.

    Raises:
        UserError: If `--config` names neither a file nor a shipped configuration.
    """
    found = list(words)
    for k, word in enumerate(words):
        option, equals, name = word.partition("=")
        if option in ("-c", "--config"):
            if equals:
                found[k] = f"{option}={_find(name)}"
            elif k + 1 < len(words):
                found[k + 1] = _find(words[k + 1])
    return found


def _find(name: str) -> str:
    if not re.fullmatch(r"[\w-]+(\.yaml)?", name) or Path(name).is_file():
        return name
    file = f"{name.removesuffix('.yaml')}.yaml"
    wheel, source_tree = _PACKAGE / "assets" / "configs", _PACKAGE.parent / "configs"
    folder = wheel if wheel.is_dir() else source_tree
    for path in (Path(file), folder / file):
        if path.is_file():
            return str(path)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"--config {name}: no such file or shipped configuration; known: {', '.join(known)}{hint}")
