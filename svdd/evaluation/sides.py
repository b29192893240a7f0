"""The numbers of a run that a comparison needs, as columns in memory."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svdd import UserError
from svdd.evaluation.images import RunImage, stream_images
from svdd.runs.command_line import continuing
from svdd.runs.config import leaves, read_config
from svdd.runs.fingerprints import FINGERPRINTS, is_reproducible, recorded_parts
from svdd.runs.folder import RunFolder

__all__ = ["WORK", "Images", "Positions", "Side", "digest", "read_side"]

WORK = ("denoiser_rows", "network_rows", "seconds")
_DIGEST = 16  # bytes

Positions = npt.NDArray[np.int64]
Images = Iterator[tuple[tuple[int, int], RunImage]]  # with prompt and image index


@dataclass(frozen=True)
class Side:
    """What a comparison needs of a run: columns with an entry for each image, so that 100,000 images take about 10 MB.

    Args:
        name: What messages call the run.
        indices: Prompt and image index of each image, [n, 2].
        texts: Digest of each image's prompt, [n].
        keys: Digest of each image's prompt, index and seed, [n]; equal ones are numbered in order of occurrence.
        images: Yields the images in order.
        settings: The configuration by dotted key; {} if it is unknown.
        rewards: Scores of each reward, [n], NaN where an image has none.
        work: Denoiser rows, network rows and seconds of each image, [n], NaN where they are unknown.
        parts: The recorded digests of weights; {} if they are unknown.
        reproducible: Whether the images were drawn in the reproducible mode.
        unfinished: Whether more images may come.
        failed: Digests of the prompts that could not be drawn.
    """

    name: str
    indices: npt.NDArray[np.int64]
    texts: npt.NDArray[np.bytes_]
    keys: npt.NDArray[np.bytes_]
    images: Callable[[], Images]
    settings: Mapping[str, Any]
    rewards: Mapping[str, npt.NDArray[np.float64]]
    work: Mapping[str, npt.NDArray[np.float64]]
    parts: Mapping[str, str] = field(default_factory=dict)
    reproducible: bool = False
    unfinished: bool = False
    failed: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, name: str, images: Callable[[], Images], config: Mapping[str, Any], **known: Any) -> "Side":
        """Reads images in one pass; `config` is the run's configuration."""
        texts, keys = bytearray(), bytearray()
        rewards: dict[str, array[float]] = {}
        work: dict[str, array[float]] = {}
        last, text = None, b""
        places = array("q")
        for count, ((prompt, index), image) in enumerate(images()):
            places.extend((prompt, index))
            if image.prompt != last:
                last, text = image.prompt, digest(image.prompt)
            texts += text
            keys += digest(f"{index} {image.seed} {image.prompt}")
            _append(rewards, image.rewards, count)
            _append(work, {each: getattr(image, each) for each in WORK}, count)
        scores, costs = ({each: np.frombuffer(values) for each, values in table.items()} for table in (rewards, work))
        indices = np.frombuffer(places, np.int64).reshape(-1, 2)
        columns = indices, _column(texts), _numbered(_column(keys))
        return cls(name, *columns, images, leaves(config), scores, costs, **known)

    def shown(self, positions: Sequence[int] | Positions) -> list[tuple[int, RunImage]]:
        """Returns the images at some positions, with their indices; more images may have come since."""
        places = [tuple(self.indices[position].tolist()) for position in positions]
        wanted, found = set(places), {}
        for place, image in self.images() if wanted else ():
            if place in wanted:
                found[place] = image
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise UserError(f"{self.name} has lost images while it was read; start the same command again")
        return [(place[1], found[place]) for place in places]


def read_side(run: Path, name: str | None = None) -> Side:
    """Reads a run, also one that is being drawn; raises a UserError if it is damaged or has no image."""
    folder, recorded = RunFolder(run), read_config(run)
    side = Side.of(
        name or str(run),
        lambda: stream_images(run),
        {} if recorded is None else recorded.config,
        parts=recorded_parts(run / FINGERPRINTS),
        reproducible=is_reproducible(run / FINGERPRINTS),
        unfinished=not folder.has_summary(),
        failed=frozenset(map(digest, folder.failed())),
    )
    if not len(side.keys):
        raise UserError(f"{side.name} holds no image; to draw some: {continuing(run)}")
    return side


def digest(text: str) -> bytes:
    """Returns a short digest of a text, by which prompts are compared."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


def _append(columns: dict[str, "array[float]"], entries: Mapping[str, float | None], count: int) -> None:
    """Appends a number to each of some columns of `count` numbers, NaN where it is unknown; new columns are begun."""
    for name in entries:
        if name not in columns:
            columns[name] = array("d", [np.nan]) * count
    for name, column in columns.items():
        number = entries.get(name)
        column.append(np.nan if number is None else number)


def _column(digests: bytearray) -> npt.NDArray[np.bytes_]:
    return np.frombuffer(bytes(digests), dtype=f"S{_DIGEST}")


def _numbered(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    """Returns digests that all differ: a repeated one becomes that of itself and the number of its repetition."""
    _, first = np.unique(keys, return_index=True)
    if len(first) == len(keys):
        return keys
    numbered, seen = keys.copy(), Counter[bytes]()
    for position in np.setdiff1d(np.arange(len(keys)), first):
        key = bytes(keys[position])
        seen[key] += 1
        numbered[position] = digest(f"{key.hex()} {seen[key]}")
    return numbered
