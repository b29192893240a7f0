"""The result rows of a study: written to one csv file as they are read, and kept as columns of numbers."""

import csv
import hashlib
import io
import os
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from svdd import UserError, say
from svdd.evaluation.studies.specification import Cell
from svdd.runs.config import leaves, read_config
from svdd.runs.files import read_object, replacing
from svdd.runs.fingerprints import FINGERPRINTS, recorded_parts
from svdd.runs.folder import RunFolder
from svdd.runs.prompts import PromptDataset
from svdd.runs.rows import ResultRow

__all__ = ["Drawn", "read_cells"]

_WORK = {  # column of ours: entry of the ledger
    **{name: name for name in ("denoiser_rows", "network_rows", "gradient_rows", "decoded_images", "reward_calls")},
    "seconds": "total_seconds",
}
_ABOUT = ("cell", "guide", "variant", "budget", "prompt_index", "image_index", "prompt", "seed", "file")
_PARTICLE = ("particle", "particle_weight")
_EMBEDDED = ("emoji", "emoji-flow")


@dataclass(frozen=True)
class Drawn:
    """What a cell has drawn: an entry per picture in every column.

    Args:
        cell: The cell.
        prompts: The index of the prompt, int64 [n].
        starts: A number that is equal for equal texts of prompts with equal random seeds, int64 [n].
        images: The number of the image among those of its prompt, equal for all its particles, int64 [n].
        weights: The share of the picture in its image: 1, or that of a particle, float64 [n].
        rewards: The scores by reward, the guide first, float64 [n]; NaN where a row has none.
        work: `denoiser_rows`, `network_rows`, `gradient_rows`, `decoded_images`, `reward_calls` and `seconds`, float64
            [n]; NaN where they are unknown.
        divergence: `path_kl_sample`, float64 [n]; NaN where it is unknown.
        finished: Whether the run is complete.
        expected: The pictures of the finished run; None if that is unknown.
        lower_is_better: The rewards whose lowest scores are the best.
        settings: The configuration by dotted key; {} if it is unknown.
        parts: The recorded digests of weights; {} if they are unknown.
        digest: A checksum of the pictures.
        features: The CLIP in whose features diversity is measured; None if none fits.
        diversity: As recorded in the summary of the run; empty if it is not.
    """

    cell: Cell
    prompts: np.ndarray
    starts: np.ndarray
    images: np.ndarray
    weights: np.ndarray
    rewards: dict[str, np.ndarray]
    work: dict[str, np.ndarray]
    divergence: np.ndarray
    finished: bool = False
    expected: int | None = None
    lower_is_better: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    features: str | None = None
    diversity: dict[str, float | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def status(self) -> str:
        """The number of pictures as a cell of a table; of an unfinished cell, with that of the finished one."""
        return f"{len(self)}{'' if self.finished or self.expected is None else f' of {self.expected}'}"


def read_cells(cells: Sequence[Cell], path: Path) -> list[Drawn]:
    """Reads all cells and writes `path`, a csv file with a line per picture.

    A cell without rows has columns without entries; from a damaged row on, a cell is left out, with a warning.
    """
    names = list(dict.fromkeys(name for cell in cells for row in islice(_rows(cell), 1) for name in row["rewards"]))
    header = [*_ABOUT, *_PARTICLE, *(f"reward.{name}" for name in names), *_WORK, "path_kl_sample"]
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        found = [_read(cell, names, path.parent, writer) for cell in cells]
        text.detach()  # flushes
    return found


def _rows(cell: Cell, warn: bool = False) -> Iterator[ResultRow]:
    """Yields the rows of a cell, up to one that is damaged."""
    read = 0
    try:
        for row in RunFolder(cell.folder).rows(checked=True):
            yield row
            read += 1
    except UserError as error:
        if warn and (read or os.path.isfile(RunFolder(cell.folder).results)):
            say(f"svdd: warning: {cell.name}: only its first {read} rows count: {error}", error=True)


def _read(cell: Cell, names: Sequence[str], around: Path, writer: Any) -> Drawn:
    """Reads the rows of a cell and writes a line for each."""
    whole = {name: array("q") for name in ("prompts", "starts", "first")}
    real = {name: array("d") for name in ("weights", "divergence", *_WORK)}
    rewards = {name: array("d") for name in names}
    measured: dict[str, None] = {}
    digest, num_images = hashlib.sha256(), None
    about = (cell.name, cell.guide, cell.variant, "" if cell.budget is None else cell.budget)
    prefix = os.path.relpath(cell.folder, around).replace(os.sep, "/")
    for row in _rows(cell, warn=True):
        particle, weight, ledger = row.get("particle", 0), row.get("particle_weight", 1.0), row.get("ledger", {})
        work = [ledger.get(name) for name in _WORK.values()]
        scores, divergence = [row["rewards"].get(name) for name in names], row.get("path_kl_sample")
        where = (row["prompt_index"], row["image_index"], row["prompt"], row.get("seed"), f"{prefix}/{row['file']}")
        writer.writerow([*about, *where, *map(row.get, _PARTICLE), *scores, *work, divergence])
        whole["prompts"].append(row["prompt_index"])
        whole["starts"].append(hash((row["prompt"], row.get("seed"))))
        whole["first"].append(row["image_index"] - particle)
        for name, number in zip(real, (weight, divergence, *work), strict=True):
            real[name].append(np.nan if number is None else number)
        for column, score in zip(rewards.values(), scores, strict=True):
            column.append(np.nan if score is None else score)
        measured.update(dict.fromkeys(row["rewards"]))
        num_images = row.get("num_images", num_images)
        digest.update(f"{where[:2]} {particle} {weight} {row.get('sha256', row['file'])}\n".encode())
    integers = {name: np.array(column, np.int64) for name, column in whole.items()}
    numbers = {name: np.array(column) for name, column in real.items()}
    return Drawn(
        cell,
        integers["prompts"],
        integers["starts"],
        _image_numbers(integers["prompts"], integers["first"]),
        numbers["weights"],
        {name: np.array(rewards[name]) for name in measured if name in rewards},
        {name: numbers[name] for name in _WORK},
        numbers["divergence"],
        digest=digest.hexdigest(),
        **_facts(cell.folder, len(integers["prompts"]), num_images),
    )


def _image_numbers(prompts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Returns the number of each picture's image, from the index of its first particle among those of the prompt."""
    if not len(prompts):
        return first
    places, counts = np.unique(np.stack([prompts, first], 1), axis=0, return_inverse=True, return_counts=True)[1:]
    return first // counts[places.reshape(-1)]


def _facts(folder: Path, drawn: int, num_images: int | None) -> dict[str, Any]:
    """Returns what the run folder says about the run: the last entries of `Drawn` but for the digest."""
    summary = read_object(RunFolder(folder).summary)
    recorded = read_config(folder) if os.path.isdir(folder) else None
    config: Any = {} if recorded is None else recorded.config
    expected = None
    if summary:
        expected = summary.get("images", 0) + summary.get("failed_prompts", 0) * (num_images or 0)
    elif config:
        with suppress(UserError, OSError, KeyError, TypeError, ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the prompts, as when the run began
            data = config["data"]
            dataset = PromptDataset(*(data[name] for name in ("prompts", "prompt_column", "limit")))
            expected = len(dataset) * (num_images or config["model"]["images_per_prompt"])
            dataset.close()
    features = None
    with suppress(KeyError, TypeError, AttributeError):
        features = config["evaluation"]["features"]
        if features is None and config["model"]["diffusion"]["init_args"]["pretrained"] in _EMBEDDED:
            features = "emoji"
    return {
        "finished": bool(summary) and drawn == expected,
        "expected": expected,
        "lower_is_better": frozenset(summary.get("lower_is_better", ())),
        "settings": leaves(config),
        "parts": recorded_parts(folder / FINGERPRINTS),
        "features": features,
        "diversity": summary.get("diversity", {}),
    }
