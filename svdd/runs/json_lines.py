"""A file of JSON lines, each about one image, that several processes write and a crash at any point cannot harm.

Each process appends to a shard of its own, `results-00000.jsonl`, and one process folds the shards into
`results.jsonl`, sorted and without doubles. Only whole lines count, so an interrupted fold is simply done again.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from svdd.runs.config import plain
from svdd.runs.files import lock, sync_folder
from svdd.runs.index import Key, Places, is_key

__all__ = ["Key", "Places", "ShardedFile", "encode"]


class ShardedFile:
    """The file that the shards are folded into, and the shards beside it.

    Args:
        path: The folded file, `.../results.jsonl`.
        is_entry: Whether a line's content is an entry; it may raise KeyError or TypeError where it is not.
    """

    def __init__(self, path: Path, is_entry: Callable[[dict[str, Any]], bool] = lambda entry: True) -> None:
        self.path = path
        self._is_entry = is_entry
        self._own_name = re.compile(rf"{re.escape(path.stem)}-\d+\.jsonl")
        self._shard: int | None = None
        self._shard_path = path

    def shards(self) -> list[Path]:
        """Returns the shards that are there."""
        folder = self.path.parent
        names = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in names if self._own_name.fullmatch(path.name))

    def open(self, rank: int) -> None:
        """Opens the shard to which the process of this rank appends, and locks it, unless that is done."""
        if self._shard is None:
            self._shard_path = self.path.with_name(f"{self.path.stem}-{rank:05d}.jsonl")
            self._shard = lock(self._shard_path, f"another process writes {self._shard_path}", os.O_APPEND)
            sync_folder(self.path.parent)

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Appends a line per entry in one write, and returns when they are on disk.

        Raises:
            ValueError: If an entry could not be read back.
            OSError: If the disk is full or cannot be written; a torn line is dropped by the next fold.
        """
        assert self._shard is not None, "open comes first"
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
        if os.write(self._shard, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._shard_path))
        os.fsync(self._shard)

    def close(self) -> None:
        """Closes this process's shard, if it is open."""
        if self._shard is not None:
            os.close(self._shard)
            self._shard = None

    def scan(self, accept: Callable[[Key, dict[str, Any]], bool]) -> tuple[Places, int]:
        """Returns where the newest accepted entry of each image begins, and the number of lines read.

        Shards are read first: entries only ever move from them to the folded file, so that none is missed meanwhile.
        """
        shards = self.shards()
        places = Places([self.path, *shards])
        lines = 0
        for number, path in (*enumerate(shards, 1), (0, self.path)):
            with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb") as file:
                offset = 0
                for line in file:
                    entry = self._parse(line)
                    if entry is not None:
                        key = (entry["prompt_index"], entry["image_index"])
                        if accept(key, entry):
                            places.add(key, number, offset, entry.get("num_images", 0))
                    offset += len(line)
                    lines += 1
        places.settle()
        return places, lines

    def fold(self, places: Places) -> None:
        """Replaces the folded file by the given entries in order, and then removes the shards."""
        temporary = self.path.with_suffix(".jsonl.tmp")
        with ExitStack() as stack, open(temporary, "wb") as output:
            sources: dict[Path, IO[bytes]] = {}
            for path, offset in places:
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
        """Removes the folded file and the shards."""
        for path in (*self.shards(), self.path):
            path.unlink(missing_ok=True)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Returns the entry in a whole line, else None."""
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            named = is_key(entry["prompt_index"], entry["image_index"])
            if named and line.endswith(b"\n") and self._is_entry(entry):
                return entry
        return None


def encode(value: Any, indent: int | None = None) -> bytes:
    """Encodes as strict JSON; a lone surrogate, which UTF-8 has not, becomes its JSON escape."""
    text = json.dumps(plain(value, finite=True), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")
