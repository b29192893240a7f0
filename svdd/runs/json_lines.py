"""A file of JSON lines, each about one image, that several processes write and that survives a crash at any point.

Each process appends to a shard of its own, such as `results-00000.jsonl`. One process merges the shards into one file,
sorted and without duplicates. Only complete lines count, so an interrupted merge can simply be repeated.
"""

import errno
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice, repeat
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from svdd.runs.config import plain
from svdd.runs.files import sync_folder

__all__ = ["RowIndex", "ShardedFile", "encode", "image_key"]

Entries = list[dict[str, Any]]

_LINES = 64  # parsed at once
_IMAGE_BITS = 24


def image_key(entry: Mapping[str, Any]) -> int | None:
    """Returns a number that orders the entries of images by prompt and image; None if their indices are invalid.

    Raises:
        KeyError: If there are no indices.
    """
    prompt, image = entry["prompt_index"], entry["image_index"]
    if type(prompt) is not int or type(image) is not int:
        return None
    valid = 0 <= prompt < 1 << 63 - _IMAGE_BITS and 0 <= image < 1 << _IMAGE_BITS
    return prompt << _IMAGE_BITS | image if valid else None


@dataclass(frozen=True)
class RowIndex:
    """Where the newest line about each image begins, by prompt and image: 32 bytes an image.

    Args:
        files: The files that hold the lines.
        table: A row per image, int64 [n, 4]: its key, the position of its file in `files`, the offset of its line
            there, and how many images its prompt has.
    """

    files: Sequence[Path]
    table: NDArray[np.int64]

    @classmethod
    def newest(cls, files: Sequence[Path], found: "array[int]") -> "RowIndex":
        """Keeps the last of several lines about an image; one in the first file only if there is no other.

        Args:
            files: The files that hold the lines.
            found: The rows of the table, flat, in the order of reading.
        """
        table = np.array(found, np.int64).reshape(-1, 4)
        table = table[np.lexsort((table[:, 1] > 0, table[:, 0]))]  # stable
        return cls(files, table[np.append(np.diff(table[:, 0]) != 0, True)[: len(table)]])

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: int | None) -> bool:
        keys = self.table[:, 0]
        at = len(keys) if key is None else int(keys.searchsorted(key))
        return at < len(keys) and int(keys[at]) == key

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        """Yields the file and the offset of each line, by prompt and image."""
        for _, file, offset, _ in self.table:
            yield self.files[file], int(offset)

    @property
    def prompts(self) -> NDArray[np.int64]:
        """The prompt of each line, int64 [n]."""
        return self.table[:, 0] >> _IMAGE_BITS

    def finished(self) -> set[int]:
        """Returns the prompts that have as many images as their lines say."""
        prompts, first, counts = np.unique(self.prompts, return_index=True, return_counts=True)
        expected = np.maximum.reduceat(self.table[:, 3], first) if len(first) else counts
        return set(prompts[counts == expected].tolist())

    def only(self, prompts: set[int]) -> "RowIndex":
        """Returns the lines of some prompts."""
        return RowIndex(self.files, self.table[np.isin(self.prompts, np.fromiter(prompts, np.int64, len(prompts)))])


class ShardedFile:
    """A merged file and the shards beside it.

    Args:
        path: The merged file.
        is_entry: Whether the content of a line is valid; it may raise KeyError or TypeError if not.
    """

    def __init__(self, path: Path, is_entry: Callable[[dict[str, Any]], bool] = lambda entry: True) -> None:
        self.path = path
        self._is_entry = is_entry
        self._shard_name = re.compile(rf"{re.escape(path.stem)}-\d+\.jsonl")
        self._shard: FileIO | None = None

    def shards(self) -> list[Path]:
        """Returns the existing shards."""
        folder = self.path.parent
        names = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in names if self._shard_name.fullmatch(path.name))

    def open(self, rank: int) -> None:
        """Opens the shard of this rank, unless it is open."""
        if self._shard is None:
            self._shard = FileIO(self.path.with_name(f"{self.path.stem}-{rank:05d}.jsonl"), "a")
            sync_folder(self.path.parent)

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Appends a line per entry in one write, and returns when they are on disk.

        Raises:
            ValueError: If an entry could not be read back.
            OSError: If the disk is full or cannot be written; the next merge drops an incomplete line.
        """
        assert self._shard is not None, "call open first"
        lines = []
        for entry in entries:
            lines.append(encode(entry) + b"\n")
            if self._parse(lines[-1]) is None:
                given = {name: entry.get(name) for name in ("prompt_index", "image_index", "num_images")}
                raise ValueError(
                    f"an entry of {self.path.name} needs the integers prompt_index and image_index, and a result row "
                    f"num_images > image_index >= 0, got {given}"
                )
        data = b"".join(lines)
        if os.write(self._shard.fileno(), data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._shard.name))
        os.fsync(self._shard.fileno())

    def close(self) -> None:
        """Closes this process's shard, if it is open."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def scan(self, accept: Callable[[Entries], Iterable[bool]] = lambda entries: repeat(True)) -> tuple[RowIndex, int]:
        """Returns where the newest accepted entry of each image begins, and the number of lines read.

        Shards are read first: entries only ever move from them to the merged file, so none is missed meanwhile.

        Args:
            accept: Says of each of a list of entries whether it counts.
        """
        files = [self.path, *self.shards()]
        found, count = array("q"), 0
        for number in (*range(1, len(files)), 0):
            for lines, offsets in _read(files[number]):
                parsed = zip([self._parse(line) for line in lines], offsets, strict=True)
                entries = [(entry, offset) for entry, offset in parsed if entry is not None]
                accepted = accept([entry for entry, _ in entries])
                for (entry, offset), good in zip(entries, accepted, strict=False):
                    if good:
                        found.extend((cast(int, image_key(entry)), number, offset, entry.get("num_images", 0)))
                count += len(lines)
        return RowIndex.newest(files, found), count

    def merge(self, index: RowIndex) -> None:
        """Replaces the merged file by the given entries in order, then removes the shards."""
        temporary = self.path.with_suffix(".jsonl.tmp")
        with ExitStack() as stack, open(temporary, "wb") as output:
            sources: dict[Path, IO[bytes]] = {}
            for path, offset in index:
                if path not in sources:
                    sources[path] = stack.enter_context(open(path, "rb"))
                sources[path].seek(offset)
                output.write(sources[path].readline())
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)
        for shard in self.shards():
            shard.unlink()

    def remove(self) -> None:
        """Removes the merged file and the shards."""
        for path in (*self.shards(), self.path):
            path.unlink(missing_ok=True)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Returns the entry in a complete line, else None."""
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if image_key(entry) is not None and line.endswith(b"\n") and self._is_entry(entry):
                return entry
        return None


def _read(path: Path) -> Iterator[tuple[list[bytes], list[int]]]:
    """Yields the lines of a file in lists, and the offset of each."""
    with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb") as file:
        offset = 0
        while lines := list(islice(file, _LINES)):
            offsets = []
            for line in lines:
                offsets.append(offset)
                offset += len(line)
            yield lines, offsets


def encode(value: Any, indent: int | None = None) -> bytes:
    """Encodes as strict JSON; a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    text = json.dumps(plain(value, finite=True), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")
