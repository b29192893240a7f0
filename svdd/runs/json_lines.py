"""A file of JSON lines, each about one image, that several processes write and that survives a crash at any point.

Each process appends to its own shard, such as `results-00000.jsonl`; one process merges the shards into one sorted
file. Only complete lines count, so an interrupted merge can be repeated.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from io import FileIO
from itertools import islice, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

from svdd.runs.config import plain
from svdd.runs.files import append, regular_only, replacing, sync_folder

__all__ = ["RowIndex", "ShardedFile", "encode"]

_THREADS = 8  # check entries: a disk may answer slowly
_LINES = 64  # parsed at once


class _Place(NamedTuple):
    """Where the line about an image begins, and the number of images of its prompt."""

    file: Path
    offset: int
    num_images: int


RowIndex = dict[tuple[int, int], _Place]  # the newest line about each image, by prompt and image


class ShardedFile:
    """A merged file and the shards beside it; `is_entry` is false, or fails, for a bad entry."""

    def __init__(self, path: Path, is_entry: Callable[[dict[str, Any]], bool] = lambda entry: True) -> None:
        self.path, self._is_entry = path, is_entry
        self._shard_name = re.compile(rf"{re.escape(path.stem)}-\d+\.jsonl")
        self._shard: FileIO | None = None

    def shards(self) -> list[Path]:
        """Returns the existing shards."""
        return sorted(path for path in self.path.parent.glob("*") if self._shard_name.fullmatch(path.name))

    def open(self, rank: int) -> FileIO:
        """Opens the shard of this rank, unless it is open."""
        if self._shard is None:
            self._shard = FileIO(self.path.with_name(f"{self.path.stem}-{rank:05d}.jsonl"), "a", opener=regular_only)
            sync_folder(self.path.parent)
        return self._shard

    def append(self, rank: int, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line per entry to this rank's shard, and returns when they are on disk.

        Raises a ValueError if an entry could not be read back, or an OSError; the next merge drops an incomplete line.
        """
        lines = []
        for entry in entries:
            lines.append(encode(entry) + b"\n")
            if self._parse(lines[-1]) is None:
                given = {name: entry.get(name) for name in ("prompt_index", "image_index", "num_images")}
                what = f"an entry of {self.path.name} needs the integers prompt_index and image_index"
                raise ValueError(f"{what}, and a result row num_images > image_index >= 0, got {given}")
        append(self.open(rank), b"".join(lines))

    def close(self) -> None:
        """Closes this process's shard, if it is open."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def scan(self, accept: Callable[[dict[str, Any]], bool] | None = None) -> tuple[RowIndex, int]:
        """Returns the place of the newest accepted entry of each image, and the number of lines read.

        Shards are read first, as entries only move from them to the merged file. `accept` is called from several
        threads; without it all entries count.
        """
        merged, newest, count = RowIndex(), RowIndex(), 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for path in (*self.shards(), self.path):
                index, lines = merged if path == self.path else newest, _lines_of(path)
                while part := list(islice(lines, _LINES)):
                    count += len(part)
                    parsed = [(entry, offset) for offset, line in part if (entry := self._parse(line)) is not None]
                    accepted = pool.map(accept, [entry for entry, _ in parsed]) if accept else repeat(True)
                    for (entry, offset), counts in zip(parsed, accepted, strict=False):
                        if counts:
                            place = _Place(path, offset, entry.get("num_images", 0))
                            index[entry["prompt_index"], entry["image_index"]] = place
        return merged | newest, count

    def entries(self, accept: Callable[[dict[str, Any]], bool] | None = None) -> Iterator[tuple[int, Any]]:
        """Yields the newest entry of each image, in the order of the merged file, also while other processes append.

        With each comes the number of its line in the merged file, from 1, or 0 for an entry of a shard. Of the shards
        only accepted entries count, and a line that is still being written is left out. Of the merged file every line
        counts; one that is not JSON is None. Memory holds the places of the shards' entries only.
        """
        with ExitStack() as stack:
            newest: dict[tuple[int, int], tuple[IO[bytes], int]] = {}
            for path in self.shards():  # before the merged file, as entries only move from them to it
                with suppress(FileNotFoundError):
                    file = stack.enter_context(open(path, "rb", opener=regular_only))
                    for offset, line in _lines(file):
                        if (entry := self._parse(line)) is not None and (accept is None or accept(entry)):
                            newest[entry["prompt_index"], entry["image_index"]] = file, offset
            waiting = sorted(newest, reverse=True)

            def next_of_shards() -> Any:
                file, offset = newest[waiting.pop()]
                file.seek(offset)
                return json.loads(file.readline())

            with suppress(FileNotFoundError):
                merged = stack.enter_context(open(self.path, "rb", opener=regular_only))
                for number, line in enumerate(merged, 1):
                    entry = None
                    with suppress(ValueError, RecursionError):
                        entry = json.loads(line)
                    key = _key(entry)
                    while waiting and key is not None and waiting[-1] < key:
                        yield 0, next_of_shards()
                    if key not in newest:
                        yield number, entry
            while waiting:
                yield 0, next_of_shards()

    def merge(self, index: RowIndex) -> None:
        """Replaces the merged file by the given entries in order, then removes the shards."""
        with replacing(self.path) as output, ExitStack() as stack:
            sources: dict[Path, IO[bytes]] = {}
            for key in sorted(index):
                path, offset, _ = index[key]
                if path not in sources:
                    sources[path] = stack.enter_context(open(path, "rb"))
                sources[path].seek(offset)
                output.write(sources[path].readline())
        for shard in self.shards():
            shard.unlink()

    def remove(self) -> None:
        """Removes the merged file and the shards."""
        for path in (*self.shards(), self.path):
            path.unlink(missing_ok=True)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Returns the entry in a complete line, else None."""
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            entry = json.loads(line)
            if _key(entry) is not None and line.endswith(b"\n") and self._is_entry(entry):
                return entry
        return None


def _key(entry: Any) -> tuple[int, int] | None:
    """Returns the indices of prompt and image; None if they are missing."""
    if not isinstance(entry, dict):
        return None
    prompt, image = entry.get("prompt_index"), entry.get("image_index")
    return (prompt, image) if type(prompt) is int and type(image) is int and prompt >= 0 and image >= 0 else None


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and the content of each line of a file; none if there is no such file."""
    with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb", opener=regular_only) as file:
        yield from _lines(file)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        yield offset, line
        offset += len(line)


def encode(value: Any, indent: int | None = None) -> bytes:
    """Encodes as strict JSON; a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    text = json.dumps(plain(value, finite=True), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")
