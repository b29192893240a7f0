"""Where the lines about each image begin, and which images are whole.

Both take some forty bytes an image, so that a hundred thousand prompts fit anywhere. Images are read and hashed many at
once, for a disk may answer slowly.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svdd.runs.tar import OWN_SHARD, digests

__all__ = ["OWN_FOLDER", "Key", "Places", "WholeImages", "is_key"]

OWN_FOLDER = re.compile(r"\d{4,}")

Key = tuple[int, int]  # prompt_index, image_index

_IMAGE_BITS = 24
_OWN_PICTURE = re.compile(r"\d{6,}-\d{2,}\.png")
_THREADS = 8
_FILES = 256  # for a thread at a time


def is_key(prompt_index: object, image_index: object) -> bool:
    """Whether these are indices that an entry may have."""
    if type(prompt_index) is not int or type(image_index) is not int:
        return False
    return 0 <= prompt_index < 1 << 63 - _IMAGE_BITS and 0 <= image_index < 1 << _IMAGE_BITS


class Places:
    """An entry per image: its file, where its line begins there, and how many images its prompt has.

    Args:
        files: The files that entries may stand in.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = list(files)
        self._added = tuple(array("q") for _ in range(4))
        self._keys, self._file, self._offset, self._num_images = (np.zeros(0, np.int64) for _ in range(4))

    def add(self, key: Key, file: int, offset: int, num_images: int) -> None:
        """Notes an entry; `settle` comes after the last one.

        Of several about one image the last counts, and one in the first file only where there is no other.
        """
        for column, number in zip(self._added, (_number(key), file, offset, num_images), strict=True):
            column.append(number)

    def settle(self) -> None:
        """Sorts what was added by image."""
        keys, *columns = (np.array(column, np.int64) for column in self._added)
        order = np.lexsort((columns[0] > 0, keys))  # stable: by image, the first file before the others
        last = np.append(keys[order][1:] != keys[order][:-1], True) if len(keys) else np.zeros(0, bool)
        order = order[last]
        self._keys = keys[order]
        self._file, self._offset, self._num_images = (column[order] for column in columns)
        self._added = tuple(array("q") for _ in range(4))

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        at = int(self._keys.searchsorted(_number(key)))
        return at < len(self._keys) and int(self._keys[at]) == _number(key)

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        """Yields the file and the offset of each entry, by prompt and image."""
        for file, offset in zip(self._file, self._offset, strict=True):
            yield self._files[file], int(offset)

    @property
    def num_prompts(self) -> int:
        """Number of prompts with an entry."""
        return len(np.unique(self._prompts))

    def finished(self) -> set[int]:
        """Returns the prompts of which as many images are there as their entries say."""
        prompts, first, counts = np.unique(self._prompts, return_index=True, return_counts=True)
        expected = np.maximum.reduceat(self._num_images, first) if len(first) else counts
        return set(prompts[counts == expected].tolist())

    def only(self, prompts: set[int]) -> "Places":
        """Returns the entries of some prompts."""
        kept = Places(self._files)
        chosen = np.isin(self._prompts, np.fromiter(prompts, np.int64, len(prompts)))
        kept._keys, kept._file = self._keys[chosen], self._file[chosen]
        kept._offset, kept._num_images = self._offset[chosen], self._num_images[chosen]
        return kept

    @property
    def _prompts(self) -> NDArray[np.int64]:
        return self._keys >> _IMAGE_BITS


def _number(key: Key) -> int:
    return key[0] << _IMAGE_BITS | key[1]


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
