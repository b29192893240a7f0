"""The most memory that a process of a run has taken on its device.

Each process keeps its own number in a file such as `memory-00001.json`, which survives a kill. At the end of the run,
rank 0 folds these files into the fingerprints.
"""

import re
from pathlib import Path

from svdd.runs.files import read_object, write_atomically
from svdd.runs.json_lines import encode

__all__ = ["PEAK_MEMORY", "Peaks"]

PEAK_MEMORY = "peak_memory_bytes"  # in the files and in the summary
_FILE = re.compile(r"memory-\d{5}\.json(\.tmp)?")


class Peaks:
    """The peaks of all processes of a run; `merged` is the file that holds the largest."""

    def __init__(self, merged: Path) -> None:
        self._merged = merged

    def files(self) -> list[Path]:
        """Returns the files of single processes, also half-written ones."""
        return sorted(path for path in self._merged.parent.glob("*") if _FILE.fullmatch(path.name))

    def record(self, rank: int, peak: int) -> None:
        """Records the peak of the process of this rank, in bytes, if it has grown."""
        own = self._merged.with_name(f"memory-{rank:05d}.json")
        if peak > _read(own):
            write_atomically(own, encode({PEAK_MEMORY: peak}) + b"\n", durable=False)

    def fold(self) -> None:
        """Moves the largest peak into the merged file, unless that of an earlier process there is larger."""
        files = self.files()
        if (most := max(map(_read, files), default=0)) > _read(self._merged):
            content = {**read_object(self._merged), PEAK_MEMORY: most}
            write_atomically(self._merged, encode(content, indent=2) + b"\n")
        for path in files:
            path.unlink()

    def largest(self) -> int | None:
        """Returns the largest merged peak, in bytes; None if none is known."""
        return _read(self._merged) or None


def _read(path: Path) -> int:
    """Returns the peak in a file; 0 if there is none."""
    found = read_object(path).get(PEAK_MEMORY)
    return found if type(found) is int else 0
