"""Which images of a run are whole: all are read and hashed, many at once, for a disk may answer slowly."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from svdd.run_tar import OWN_SHARD, digests

__all__ = ["OWN_FOLDER", "WholeImages"]

OWN_FOLDER = re.compile(r"\d{4,}")

_OWN_PICTURE = re.compile(r"\d{6,}-\d{2,}\.png")
_THREADS = 8
_FILES = 256  # for a thread at a time


class WholeImages:
    """The images under a run's `images` and their SHA-256, eight bytes for each; those of a shard are read in a row.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        marks = array("Q")
        pool = ThreadPoolExecutor(_THREADS, "svdd-images")
        try:
            for part in pool.map(lambda files: _marks(run, files), _parts(run)):
                marks.extend(part)
        finally:  # a signal does not wait for the rest
            pool.shutdown(cancel_futures=True)
        self._marks = np.sort(np.frombuffer(marks, np.uint64))

    def has(self, file: str, digest: str) -> bool:
        """Whether the image of a row is there, with the digest in the row."""
        mark = np.uint64(_mark(file, digest))
        at = int(self._marks.searchsorted(mark))
        return at < len(self._marks) and bool(self._marks[at] == mark)


def _parts(run: Path) -> Iterator[list[str]]:
    """Yields the images that have files of their own in lists, and each shard alone."""
    loose: list[str] = []
    for name in _names(run / "images"):
        if OWN_SHARD.fullmatch(name):
            yield [f"images/{name}"]
        elif _OWN_PICTURE.fullmatch(name):
            loose.append(f"images/{name}")
        elif OWN_FOLDER.fullmatch(name):
            inside = (f"images/{name}/{picture}" for picture in _names(run / "images" / name))
            while part := list(islice(inside, _FILES)):
                yield part
    for start in range(0, len(loose), _FILES):
        yield loose[start : start + _FILES]


def _names(folder: Path) -> list[str]:
    with suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def _marks(run: Path, files: list[str]) -> list[int]:
    marks = []
    for file in files:
        with suppress(OSError):
            if file.endswith(".tar"):
                marks += [_mark(f"{file}/{name}", digest) for name, digest in digests(run / file)]
            else:
                marks.append(_mark(file, hashlib.sha256((run / file).read_bytes()).hexdigest()))
    return marks


def _mark(file: str, digest: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{file} {digest}".encode(), digest_size=8).digest(), "little")
