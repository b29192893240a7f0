"""Images in tar shards that WebDataset can read; a crash at any point harms one batch at most.

A shard holds `000012-00.png` and `000012-00.json`, the image's row, for each image. Every process writes its own
shards, `images/00003-000000.tar`, and begins a new one whenever a run continues: no image is ever appended to an
incomplete file. When the run continues, incomplete ends are cut off, and images without a row are removed.
"""

import errno
import os
import re
import tarfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path

from svdd.runs.files import append, replacing, sync_folder

__all__ = ["SHARD_NAME", "TarWriter", "read_image", "repair"]

SHARD_NAME = re.compile(r"\d{5,}-\d{6,}\.tar")

_END = bytes(2 * tarfile.BLOCKSIZE)
_one_reader = threading.Lock()  # several threads would read the same headers

Members = dict[str, tuple[int, int]]  # offset and size of the data, by name


class TarWriter:
    """The shards that the process of one rank writes to a folder; a shard is closed at `images_per_shard` images."""

    def __init__(self, folder: Path, rank: int, images_per_shard: int = 1000) -> None:
        self._folder, self._rank, self._limit = folder, rank, images_per_shard
        taken = [int(path.stem.split("-")[1]) for path in _shards(folder) if path.name.startswith(f"{rank:05d}-")]
        self._next = max(taken, default=-1) + 1
        self._file: FileIO | None = None
        self._count = 0

    def shard(self) -> str:
        """Returns the name of the shard for the next batch, and opens it."""
        name = f"{self._rank:05d}-{self._next:06d}.tar"
        if self._file is None:
            self._file, self._count = FileIO(self._folder / name, "x"), 0
        return name

    def append(self, members: Iterable[tuple[str, bytes]], images: int) -> None:
        """Appends the members of a batch in one write, and returns when they are on disk; `shard` comes first.

        Raises:
            OSError: If the disk is full or cannot be written; the next run drops what is incomplete.
        """
        assert self._file is not None, "call shard first"
        append(self._file, b"".join(_encode(name, data) for name, data in members))
        sync_folder(self._folder)
        self._count += images
        if self._count >= self._limit:
            self.close()

    def close(self) -> None:
        """Ends the open shard, if there is one."""
        if self._file is not None:
            file, self._file, self._next = self._file, None, self._next + 1
            with file, suppress(OSError):  # a shard without its end can be read too
                append(file, _END)


def read_image(run: Path, file: str) -> bytes:
    """Returns the bytes of an image of a run, from its own file or out of a shard, by the `file` of its row.

    Raises:
        OSError: If the image is missing or incomplete.
    """
    path = run / file
    shard = path.parent
    if shard.suffix != ".tar":
        return path.read_bytes()
    status = shard.stat()
    with _one_reader:
        members = _members(shard, status.st_size, status.st_mtime_ns)
    if path.name not in members or f"{path.stem}.json" not in members:  # the row is written after its image
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    return _read(shard, *members[path.name])


def repair(folder: Path, wanted: dict[str, set[str]]) -> None:
    """Keeps the wanted images in a folder's shards, given by shard and without suffix; removes all others."""
    for shard in _shards(folder):
        names = wanted.get(shard.name, set())
        if not names:
            shard.unlink()
            continue
        members = _scan(shard, shard.stat().st_size)
        if {Path(name).stem for name in members} != names:
            with replacing(shard) as output:
                for name, place in members.items():
                    if Path(name).stem in names:
                        output.write(_encode(name, _read(shard, *place)))
                output.write(_END)
            continue
        end = max(-(-(offset + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for offset, size in members.values())
        if end + len(_END) != shard.stat().st_size:
            os.truncate(shard, end)
            os.truncate(shard, end + len(_END))  # zeros end a tar file


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if SHARD_NAME.fullmatch(path.name))


def _encode(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _read(shard: Path, offset: int, size: int) -> bytes:
    with open(shard, "rb") as content:
        content.seek(offset)
        return content.read(size)


@lru_cache(maxsize=256)
def _members(shard: Path, size: int, modified: int) -> Members:
    return _scan(shard, size)  # until the shard changes


def _scan(shard: Path, size: int) -> Members:
    """Returns the complete members of a shard."""
    members = {}
    with suppress(tarfile.TarError), tarfile.open(shard, "r:", ignore_zeros=False) as archive:
        for member in archive:
            if member.offset_data + member.size > size:
                break
            members[member.name] = (member.offset_data, member.size)
            archive.members = []  # type: ignore[attr-defined]  # it keeps every member otherwise
    return members
