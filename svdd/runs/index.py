"""Where the newest line about each image begins: 32 bytes an image, so that a hundred thousand prompts fit anywhere."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RowIndex", "image_key"]

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
    """A line per image, sorted by prompt and image.

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
