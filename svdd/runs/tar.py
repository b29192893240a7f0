"""Images in tar shards as WebDataset reads them, instead of a file each; a crash at any point harms one batch.

A shard holds `000012-00.png` and `000012-00.json`, the image's row, for each image. Every process writes shards of its
own, `images/00003-000000.tar`, and begins a new one whenever a run continues, so that no image is ever appended to what
a crash may have torn. When the run continues, a torn end is cut off, and a shard that holds images without a row is
written anew.
"""

import errno
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from svdd.runs.files import sync_folder

__all__ = ["OWN_SHARD", "TarWriter", "digests", "is_in_shard", "member_of", "read_image", "repair"]

OWN_SHARD = re.compile(r"\d{5,}-\d{6,}\.tar")

_END = bytes(2 * tarfile.BLOCKSIZE)


class TarWriter:
    """The shards that one process writes.

    Args:
        folder: Where they go.
        rank: This process.
        images_per_shard: A shard with so many images is closed.
    """

    def __init__(self, folder: Path, rank: int, images_per_shard: int = 1000) -> None:
        self._folder, self._rank, self._limit = folder, rank, images_per_shard
        taken = [int(path.stem.split("-")[1]) for path in folder.glob(f"{rank:05d}-*.tar") if _is_own(path)]
        self._next = max(taken, default=-1) + 1
        self._path: Path | None = None
        self._descriptor = -1
        self._count = 0

    def shard(self) -> str:
        """Returns the name of the shard that takes the next batch, and opens it."""
        if self._path is None:
            self._path = self._folder / f"{self._rank:05d}-{self._next:06d}.tar"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._descriptor = os.open(self._path, flags, 0o666)
            self._next, self._count = self._next + 1, 0
        return self._path.name

    def append(self, members: Iterable[tuple[str, bytes]], images: int) -> None:
        """Appends the members of a batch in one write, and returns when they are on disk.

        Raises:
            OSError: If the disk is full or cannot be written; the next run drops what is torn.
        """
        self._write(b"".join(_encode(name, data) for name, data in members))
        sync_folder(self._folder)
        self._count += images
        if self._count >= self._limit:
            self.close()

    def close(self) -> None:
        """Ends the shard at work, if there is one."""
        if self._path is not None:
            try:
                with suppress(OSError):  # a shard without its end can be read too
                    self._write(_END)
            finally:
                os.close(self._descriptor)
                self._path = None

    def _write(self, data: bytes) -> None:
        if os.write(self._descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        os.fsync(self._descriptor)


def is_in_shard(file: str, name: str) -> bool:
    """Whether a row's `file` names the member `name` of a shard, `images/00003-000000.tar/000012-00.png`."""
    folder, _, rest = file.partition("/")
    shard, _, member = rest.partition("/")
    return folder == "images" and OWN_SHARD.fullmatch(shard) is not None and member == name


def member_of(file: str) -> tuple[str, str] | None:
    """Splits a row's `file` into the path of a shard and a member's name; None where it is no shard's."""
    path = PurePosixPath(file)
    return (str(path.parent), path.name) if path.parent.suffix == ".tar" else None


def read_image(run: Path, file: str) -> bytes:
    """Returns an image's bytes, from its own file or out of a shard.

    Args:
        run: The run folder.
        file: What the image's row says.

    Raises:
        OSError: If it is not there.
    """
    inside = member_of(file)
    if inside is None:
        return (run / file).read_bytes()
    shard, name = run / inside[0], inside[1]
    status = shard.stat()
    members = _members(shard, status.st_size, status.st_mtime_ns)
    place = members.get(name)
    if place is None or f"{name.partition('.')[0]}.json" not in members:  # written last: without it the image is torn
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    with open(shard, "rb") as content:
        content.seek(place[0])
        return content.read(place[1])


def digests(shard: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the SHA-256 of each whole image of a shard, in the order in which they stand there."""
    members = _scan(shard, shard.stat().st_size)
    with open(shard, "rb") as content:
        for name, (at, size) in members.items():
            if name.endswith(".png") and f"{name.partition('.')[0]}.json" in members:
                content.seek(at)
                yield name, hashlib.sha256(content.read(size)).hexdigest()


def repair(folder: Path, wanted: dict[str, set[str]]) -> None:
    """Leaves the wanted images in the shards, and no others; a shard without any is removed.

    Args:
        folder: Where the shards are.
        wanted: The names, without their ending, of the images in each shard.
    """
    for shard in sorted(path for path in folder.glob("*.tar") if _is_own(path)):
        names = wanted.get(shard.name, set())
        if not names:
            shard.unlink()
            continue
        size = shard.stat().st_size
        members = _scan(shard, size)
        if {name.partition(".")[0] for name in members} != names:
            _rewrite(shard, {name: place for name, place in members.items() if name.partition(".")[0] in names})
            continue
        end = max(-(-(at + length) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for at, length in members.values())
        if end + len(_END) != size:
            _cut(shard, end)


def _rewrite(shard: Path, members: dict[str, tuple[int, int]]) -> None:
    """Replaces a shard by one with some of its members, which are copied one by one."""
    temporary = shard.with_name(shard.name + ".tmp")
    with open(shard, "rb") as content, open(temporary, "wb") as output:
        for name, (at, size) in members.items():
            content.seek(at)
            output.write(_encode(name, content.read(size)))
        output.write(_END)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, shard)
    sync_folder(shard.parent)


def _cut(shard: Path, end: int) -> None:
    """Ends a shard behind its last member, which stays where it is."""
    with open(shard, "r+b") as content:
        content.truncate(end)
        content.seek(end)
        content.write(_END)
        content.flush()
        os.fsync(content.fileno())


def _is_own(path: Path) -> bool:
    return OWN_SHARD.fullmatch(path.name) is not None


def _encode(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@lru_cache(maxsize=256)
def _members(shard: Path, size: int, stamp: int) -> dict[str, tuple[int, int]]:
    """Remembers what `_scan` has found; the two numbers tell an edited shard."""
    return _scan(shard, size)


def _scan(shard: Path, size: int) -> dict[str, tuple[int, int]]:
    """Returns where the data of each whole member begins and how long it is."""
    members = {}
    with suppress(tarfile.TarError), tarfile.open(shard, "r:", ignore_zeros=False) as archive:
        for member in archive:
            if member.offset_data + member.size > size:
                break
            members[member.name] = (member.offset_data, member.size)
            archive.members = []  # type: ignore[attr-defined]  # it keeps every member otherwise
    return members
