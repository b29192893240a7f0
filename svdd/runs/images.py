"""The images of a run, in files of their own or in tar shards that WebDataset can read.

A shard holds `000012-00.png` and `000012-00.json`, the image's row, for each image. Every process writes its own
shards, `images/00003-000000.tar`, and begins a new one whenever a run continues: no image is ever appended to an
incomplete file. When the run continues, incomplete ends are cut off, and images without a row are removed.
"""

import errno
import hashlib
import os
import re
import tarfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, cast

from svdd.runs.bounds import MAX_PICTURE_BYTES
from svdd.runs.files import append, regular_only, replacing, sync_folder, write_atomically
from svdd.runs.json_lines import encode
from svdd.runs.rows import ResultRow, row_fault

__all__ = ["RunImages", "image_name", "is_complete", "read_image"]

_IMAGES_PER_FOLDER = 10_000  # larger folders are slow to list and to back up
_SUBFOLDER, _SHARD = re.compile(r"\d{4,}"), re.compile(r"\d{5,}-\d{6,}\.tar")
_OWN_FILE = re.compile(rf"(\d{{6,}}-\d{{2,}}\.png|{_SHARD.pattern})(\.tmp)?")
_FILE = re.compile(rf"images/(?:(?:{_SUBFOLDER.pattern}|{_SHARD.pattern})/)?([^/]+)")

_END = bytes(2 * tarfile.BLOCKSIZE)
_one_reader = threading.Lock()  # several threads would read the same headers


class RunImages:
    """The images of one run; see `RunFolder` for the arguments. A tar shard is closed at `images_per_shard` images."""

    def __init__(self, run: Path, tar: bool = False, images_per_shard: int = 1000) -> None:
        self.run, self.folder, self.tar = run, run / "images", tar
        self.rank, self._images_per_shard = 0, images_per_shard  # the rank of this process names its shards
        self._shard: FileIO | None = None
        self._count = 0  # images in the shard

    def close(self) -> None:
        """Ends the open tar shard, if there is one."""
        if self._shard is not None:
            shard, self._shard = self._shard, None
            with shard, suppress(OSError):  # a shard without its end can be read too
                append(shard, _END)

    def write(self, images: Iterable[tuple[ResultRow, bytes]]) -> list[ResultRow]:
        """Puts PNG files on disk and returns their rows with `file` and `sha256`."""
        return self._write_tar(images) if self.tar else self._write_files(images)

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether the image of a row is there with the recorded checksum."""
        with suppress(OSError):
            return hashlib.sha256(read_image(self.run, row["file"])).hexdigest() == row["sha256"]
        return False

    def is_there(self, row: Mapping[str, Any]) -> bool:
        """Whether the image of a row exists; its content is not read."""
        path = self.run / row["file"]
        with suppress(OSError):
            return path.name in _members(path.parent) if path.parent.suffix == ".tar" else path.is_file()
        return False

    def remove(self, everything: bool) -> None:
        """Removes files that a crash left half written, or all images; keeps all files of other origin."""
        subfolders = [path for path in self.folder.glob("*") if _SUBFOLDER.fullmatch(path.name) and path.is_dir()]
        for path in sorted(path for folder in (self.folder, *subfolders) for path in folder.glob("*")):
            if _OWN_FILE.fullmatch(path.name) and (everything or path.suffix == ".tmp"):
                path.unlink()
        for folder in subfolders if everything else ():
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def keep_only(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Repairs the tar shards and removes images without a row from them."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            path = PurePosixPath(row["file"])
            if path.parent.suffix == ".tar":
                wanted[path.parent.name].add(path.stem)
        for shard in _shards(self.folder):
            _repair(shard, wanted[shard.name])

    def _write_files(self, images: Iterable[tuple[ResultRow, bytes]]) -> list[ResultRow]:
        rows, folders = [], {self.folder}
        for row, png in images:
            file = image_name(row["prompt_index"], row["image_index"], row["num_images"] or 1)
            path = self.run / file
            path.parent.mkdir(exist_ok=True)
            folders.add(path.parent)
            write_atomically(path, png, durable=False)
            rows.append(_complete(row, file, png))
        for folder in folders:
            sync_folder(folder)
        return rows

    def _write_tar(self, images: Iterable[tuple[ResultRow, bytes]]) -> list[ResultRow]:
        """Appends each image and its row to the open shard, all in one write."""
        rows, members = [], []
        for row, png in images:
            if self._shard is None:
                self._shard, self._count = self._new_shard(), 0
            name = Path(image_name(row["prompt_index"], row["image_index"])).name
            rows.append(_complete(row, f"images/{Path(str(self._shard.name)).name}/{name}", png))
            members += [_encode(name, png), _encode(Path(name).stem + ".json", encode(rows[-1]))]
        if self._shard is not None and members:
            append(self._shard, b"".join(members))
            sync_folder(self.folder)
            self._count += len(rows)
            if self._count >= self._images_per_shard:
                self.close()
        return rows

    def _new_shard(self) -> FileIO:
        taken = [path.stem.split("-") for path in _shards(self.folder)]
        number = max((int(number) for rank, number in taken if int(rank) == self.rank), default=-1) + 1
        return FileIO(self.folder / f"{self.rank:05d}-{number:06d}.tar", "x")


def image_name(prompt_index: int, image_index: int, num_images: int = 1) -> str:
    """Returns an image's path in the run folder: `images/000012-00.png`, or `images/0001/010234-00.png`.

    The first 10,000 images lie in `images`, and each subfolder holds the next 10,000 at most, so that the path of an
    image stays the same when the run grows.
    """
    number = prompt_index // max(1, _IMAGES_PER_FOLDER // num_images)
    subfolder = f"{number:04d}/" if number else ""
    return f"images/{subfolder}{prompt_index:06d}-{image_index:02d}.png"


def _complete(row: ResultRow, file: str, png: bytes) -> ResultRow:
    return cast(ResultRow, {**row, "file": file, "sha256": hashlib.sha256(png).hexdigest()})


def is_complete(row: Mapping[str, Any]) -> bool:
    """Whether a row can be read back: it has no `row_fault`, and names its image as svdd does.

    A prompt has the images 0 to num_images - 1. May also fail for a row that is not complete.
    """
    if type(row["num_images"]) is not int or not 0 <= row["image_index"] < row["num_images"]:
        return False
    if "ledger" not in row or row_fault(row):
        return False
    named = _FILE.fullmatch(row["file"])
    right = named is not None and f"images/{named[1]}" == image_name(row["prompt_index"], row["image_index"])
    return right and isinstance(row["sha256"], str)


def read_image(run: Path, file: str) -> bytes:
    """Returns an image by the `file` of its row, from its own file or out of a shard; an OSError if it is not whole."""
    path = run / file
    shard = path.parent
    if shard.suffix != ".tar":
        with open(path, "rb", opener=regular_only) as picture:
            if (size := os.fstat(picture.fileno()).st_size) > MAX_PICTURE_BYTES:
                raise OSError(errno.EFBIG, f"has {size} bytes, at most {MAX_PICTURE_BYTES} are read", str(path))
            return picture.read()
    members = _members(shard)
    if path.name not in members or f"{path.stem}.json" not in members:  # the row is written after its image
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    return _read(shard, *members[path.name])


def _repair(shard: Path, names: set[str]) -> None:
    """Keeps the images with these names, without suffix, in a shard; removes it if there are none."""
    if not names:
        shard.unlink()
        return
    members = _members(shard)
    if {Path(name).stem for name in members} != names:
        with replacing(shard) as output:
            for name, place in members.items():
                if Path(name).stem in names:
                    output.write(_encode(name, _read(shard, *place)))
            output.write(_END)
        return
    end = max(-(-(offset + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for offset, size in members.values())
    if end + len(_END) != shard.stat().st_size:
        os.truncate(shard, end)
        os.truncate(shard, end + len(_END))  # zeros end a tar file


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if _SHARD.fullmatch(path.name))


def _encode(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _read(shard: Path, offset: int, size: int) -> bytes:
    with open(shard, "rb", opener=regular_only) as content:
        content.seek(offset)
        return content.read(size)


def _members(shard: Path) -> dict[str, tuple[int, int]]:
    """Returns the offset and the size of the data of each complete member, by name."""
    status = shard.stat()
    with _one_reader:
        return _scan(shard, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)  # until the shard changes
def _scan(shard: Path, size: int, modified: int) -> dict[str, tuple[int, int]]:
    members = {}
    with (
        open(shard, "rb", opener=regular_only) as content,
        suppress(tarfile.TarError),
        tarfile.open(fileobj=content, mode="r:", ignore_zeros=False) as archive,
    ):
        for member in archive:
            if member.offset_data + member.size > size:
                break
            members[member.name] = (member.offset_data, member.size)
            archive.members = []  # type: ignore[attr-defined]  # it keeps every member otherwise
    return members
