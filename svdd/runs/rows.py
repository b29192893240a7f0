"""The result row: what a run records about one image, one JSON object per line."""

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypedDict, cast

__all__ = ["MAX_SEED", "RESERVED_COLUMNS", "Prompt", "ResultRow", "result_row", "row_fault"]

MAX_SEED = 2**64 - 1


class ResultRow(TypedDict, total=False):
    """What is known about one image, with the other columns of the prompt's source."""

    prompt_index: int  # position of the prompt in its source, from 0
    image_index: int  # position of the image among those of its prompt, from 0
    num_images: int  # of the prompt
    prompt: str
    seed: int  # of the image's noise
    rewards: dict[str, float]  # score by reward, the guide first
    ledger: dict[str, float]  # work done for the image: rows, calls and seconds
    selection: dict[str, float]  # what the sampler's choices came to: see `Trace.statistics`
    negative_prompt: str  # this and the following only where they apply
    particle: int  # position among the particles that the sampler returned for one seed
    particle_weight: float
    path_kl_sample: float  # its mean over images bounds the divergence from the pretrained model, in nats
    file: str  # path of the image in the run folder, known once it is written
    sha256: str  # of the image file


# Columns that a prompt source may not have, because they would overwrite a result.
RESERVED_COLUMNS = frozenset(ResultRow.__annotations__) - {"negative_prompt", "seed"}

_LARGEST = 1e100  # squares of numbers below it are finite


class Prompt(NamedTuple):
    """One prompt and what its source says about it."""

    index: int  # type: ignore[assignment]  # hides tuple.index; position in the source, from 0, blank ones not counted
    text: str  # on one line
    negative_prompt: str | None  # what the image should not show
    seed: int | None  # of the prompt's first image
    extra: dict[str, Any]  # all other columns of the source, copied into the results
    folder: str | None = None  # to which relative paths in columns refer; None for the working directory

    def image_seeds(self, seed: int, count: int) -> list[int]:
        """Returns `count` seeds, one per image: the run's seed + index * count + k, or the prompt's own seed + k."""
        first = seed + self.index * count if self.seed is None else self.seed
        return [(first + k) % (MAX_SEED + 1) for k in range(count)]


def result_row(
    prompt: Prompt,
    image_index: int,
    num_images: int,
    seed: int,
    rewards: Mapping[str, float],
    ledger: Mapping[str, float],
    particle: tuple[int, float] | None = None,
    path_kl_sample: float | None = None,
    selection: Mapping[str, float] | None = None,
) -> ResultRow:
    """Builds the row of an image that is not yet written, columns in order; `particle` is its position and weight."""
    row: dict[str, Any] = {"prompt_index": prompt.index, "image_index": image_index, "num_images": num_images}
    row["prompt"] = prompt.text
    if prompt.negative_prompt is not None:
        row["negative_prompt"] = prompt.negative_prompt
    row |= {**prompt.extra, "seed": seed}
    if particle is not None:
        row["particle"], row["particle_weight"] = particle
    row["rewards"] = rewards
    if path_kl_sample is not None:
        row["path_kl_sample"] = path_kl_sample
    if selection is not None:
        row["selection"] = selection
    return cast(ResultRow, {**row, "ledger": ledger})


def row_fault(row: Any) -> str:
    """Returns what makes an entry unreadable as the row of a finished image; empty if nothing does."""
    if not isinstance(row, dict):
        return "not an object"
    for name in ("prompt_index", "image_index", *(["particle"] if "particle" in row else [])):
        if type(row.get(name)) is not int or not 0 <= row[name] < 2**63:
            return f"{name} is {row.get(name)!r:.40}, expected an integer >= 0"
    if row.get("particle", 0) > row["image_index"]:
        return "particle is larger than image_index"
    for name in ("prompt", "file"):
        if not isinstance(row.get(name), str):
            return f"{name} is {row.get(name)!r:.40}, expected text"
    if type(seed := row.get("seed", 0)) is not int or not 0 <= seed <= MAX_SEED:
        return f"seed is {seed!r:.40}, expected an integer from 0 to 2^64 - 1"
    path = PurePosixPath(row["file"])
    if path.is_absolute() or ".." in path.parts:
        return f"file is {row['file']!r:.80}, expected a path in the folder"
    numbers = {name: row.get(name, 1.0) for name in ("particle_weight", "path_kl_sample")}
    for name in ("rewards", "ledger", "selection"):
        if not isinstance(entries := row.get(name, None if name == "rewards" else {}), dict):
            return f"{name} is {entries!r:.40}, expected numbers by name"
        numbers |= {f"{name}.{key}": number for key, number in entries.items()}
    for name, number in numbers.items():
        if type(number) not in (int, float) or not abs(number) < _LARGEST or not math.isfinite(number):
            return f"{name} is {number!r:.40}, expected a finite number"
    return "particle_weight is negative" if numbers["particle_weight"] < 0 else ""
