"""Finished measurements, one file each until they are committed together, so that a benchmark can be continued."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Cells"]

Key = Mapping[str, str | int]


class Cells:
    """Measurements by their key: those of a data file, and those in a folder, which were added since.

    Args:
        data: The file with a line per measurement, which is committed.
        folder: The folder of new measurements.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        lines = data.read_text().splitlines() if data.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        lines += [path.read_text() for path in sorted(folder.glob("*.json"))]
        self._found = {_identity(cell["key"]): cell for cell in map(json.loads, lines)}

    def __contains__(self, key: Key) -> bool:
        return _identity(key) in self._found or self._path(key).exists()

    def add(self, key: Key, found: Mapping[str, Any]) -> None:
        """Keeps a measurement; the file appears whole."""
        cell, path = {"key": dict(key), **found}, self._path(key)
        path.with_suffix(".tmp").write_text(json.dumps(cell) + "\n")
        path.with_suffix(".tmp").rename(path)
        self._found[_identity(key)] = cell

    def select(self, **wanted: str | int) -> list[dict[str, Any]]:
        """Returns the measurements whose keys have these entries, in the order of their keys."""
        chosen = [each for each in self._found.values() if each["key"].items() >= wanted.items()]
        return sorted(chosen, key=lambda cell: _identity(cell["key"]))

    def commit(self) -> None:
        """Writes all measurements to the data file."""
        self.data.parent.mkdir(exist_ok=True)
        lines = (json.dumps(self._found[name], separators=(",", ":")) for name in sorted(self._found))
        self.data.write_text("".join(f"{line}\n" for line in lines))

    def _path(self, key: Key) -> Path:
        return self.folder / f"{_identity(key).replace('/', '_')}.json"


def _identity(key: Key) -> str:
    return "--".join(f"{entry:03d}" if isinstance(entry, int) else entry for entry in key.values())
