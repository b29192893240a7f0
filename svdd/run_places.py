"""Where the lines about each image begin: thirty bytes an image, so that a hundred thousand prompts fit anywhere."""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Key", "Places", "is_key"]

Key = tuple[int, int]  # prompt_index, image_index

_IMAGE_BITS = 24


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
