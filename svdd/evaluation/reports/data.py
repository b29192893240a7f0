"""What a report shows about runs, read from their folders."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from svdd.evaluation.baseline import compare
from svdd.evaluation.metrics.intervals import clustered, mean_of, standard_error, t_interval
from svdd.evaluation.pairing import pair
from svdd.evaluation.sides import Side, read_side
from svdd.runs.config import CONFIG
from svdd.runs.files import regular_only
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.runs.rows import ResultRow

__all__ = ["Estimate", "ReportImage", "ReportRun", "differences", "read_run"]

_COLUMNS = ("ess", "alpha", "candidates", "value_mean", "value_std", "value_max", "value_chosen", "ancestors")
_MOST_COLUMNS, _MOST_LETTERS = 20, 500  # of what a prompt file says besides the prompt
_MOST_CONFIG = 2**20  # characters

Estimate = dict[str, float | None]  # `mean`, and the ends `low` and `high` of its interval if it has one


class ReportImage(NamedTuple):
    """One picture; of several particles of an image, each is one."""

    prompt: str
    prompt_index: int
    number: int  # of the image among those of its prompt
    file: str  # in the run folder
    rewards: Mapping[str, float]
    seed: int | None
    particle: int | None
    weight: float  # of the particle; the weights of an image sum to 1
    negative_prompt: str | None
    selection: Mapping[str, float]
    ledger: Mapping[str, float]
    path_kl: float | None
    columns: dict[str, str]  # what the prompt's source says besides
    trace: str  # the columns of the trace as JSON; empty without one


@dataclass(frozen=True)
class ReportRun:
    """One run, by prompt and image."""

    folder: Path
    images: list[ReportImage]
    hidden: int  # pictures beyond the limit
    config: str  # the recorded configuration as it stands in the folder
    side: Side  # what comparisons need of all its images

    @property
    def sampler(self) -> str:
        """The class name of the sampler, if it is known."""
        return str(self.side.settings.get("model.sampler.class_path", "")).rpartition(".")[2]

    def means(self) -> dict[str, Estimate]:
        """Returns the mean of each reward over the images that have it, with its 95 % interval, clustered by prompt."""
        found = {}
        for name in dict.fromkeys(name for image in self.images for name in image.rewards):
            known = [image for image in self.images if name in image.rewards]
            weighted = [(image.rewards[name], image.weight) for image in known]
            groups = clustered(weighted, [image.prompt_index for image in known])
            if not math.isnan(mean := mean_of(weighted)):
                found[name] = _estimate(mean, *t_interval(mean, standard_error(groups), len(groups)))
        return found

    def cost(self) -> dict[str, float]:
        """Returns the mean of each entry of the ledger per picture, of those that all pictures have."""
        names = self.images[0].ledger if self.images else ()
        shared = [name for name in names if all(name in image.ledger for image in self.images)]
        return {name: fmean(image.ledger[name] for image in self.images) for name in shared}


def read_run(folder: Path, name: str, limit: int) -> ReportRun:
    """Reads a run that is finished, is still being drawn, or was killed.

    Args:
        folder: The run folder.
        name: What the report calls it.
        limit: The most pictures that are shown.

    Raises:
        UserError: If the folder holds no image, or a row is damaged.
    """
    run = RunFolder(folder)
    images: list[ReportImage] = []
    traces, hidden = _Traces(run), 0
    rows = groupby(
        run.rows(checked=True), lambda row: (row["prompt_index"], row["image_index"] - row.get("particle", 0))
    )
    for key, particles in rows:
        members = list(particles)
        if hidden or (images and len(images) + len(members) > limit):
            hidden += len(members)
            continue
        images += _images(members, key[1] // len(members), traces.of(key))
    config = ""
    with suppress(OSError), open(folder / CONFIG, encoding="utf-8", errors="replace", opener=regular_only) as file:
        config = file.read(_MOST_CONFIG)
    return ReportRun(folder, images, hidden, config, read_side(folder, name))


def differences(runs: Sequence[ReportRun]) -> dict[str, dict[str, Estimate]]:
    """Returns the differences of each reward between two runs, by `K-J` for run K less run J.

    They are those of `svdd compare` with run J as the baseline, over the images that all runs have; {} without any.
    """
    sides = [run.side for run in runs]
    positions, found = pair(sides), {}
    for j, plain in enumerate(sides if len(positions[0]) else ()):
        order = [j, *(k for k in range(len(sides)) if k != j)]
        entries = compare(plain, [sides[k] for k in order[1:]], [positions[k] for k in order])
        for k, entry in zip(order[1:], entries, strict=True):
            found[f"{k}-{j}"] = {
                name: _estimate(each["difference"], each["ci95_low"], each["ci95_high"]) for name, each in entry.items()
            }
    return found


class _Traces:
    """The traces of a run, asked for by the keys of its images in order."""

    def __init__(self, run: RunFolder) -> None:
        self._known = run.traces()
        self._next: dict[str, Any] | None = None

    def of(self, key: tuple[int, int]) -> dict[str, Any] | None:
        """Returns the trace of the image with these indices of prompt and first picture; None if there is none."""
        while self._next is None or _key(self._next) < key:
            if (trace := next(self._known, None)) is None:
                return None
            self._next = trace
        return self._next if _key(self._next) == key else None


def _key(trace: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the indices of a trace's prompt and image; (-1, -1), which comes first, if it is damaged."""
    prompt, image = trace.get("prompt_index"), trace.get("image_index")
    return (prompt, image) if type(prompt) is int and type(image) is int else (-1, -1)


def _images(rows: list[ResultRow], number: int, trace: dict[str, Any] | None) -> Iterator[ReportImage]:
    """Yields the pictures of one image; particles without any weight have equal ones."""
    text = _compact(trace)
    weights = [row.get("particle_weight", 1.0) for row in rows]
    total = math.fsum(weights)
    for row, weight in zip(rows, weights, strict=True):
        extra = [(name, row[name]) for name in row if name not in ResultRow.__annotations__]  # type: ignore[literal-required]
        yield ReportImage(
            row["prompt"],
            row["prompt_index"],
            number,
            row["file"],
            row["rewards"],
            seed if type(seed := row.get("seed")) is int else None,
            row.get("particle"),
            weight / total if total else 1 / len(rows),
            negative if isinstance(negative := row.get("negative_prompt"), str) else None,
            row.get("selection", {}),
            row.get("ledger", {}),
            row.get("path_kl_sample"),
            {name[:_MOST_LETTERS]: _written(entry)[:_MOST_LETTERS] for name, entry in extra[:_MOST_COLUMNS]},
            text,
        )


def _compact(trace: Mapping[str, Any] | None) -> str:
    """Returns the columns of a trace that hold numbers as JSON; a column that holds one number only as that number."""
    if trace is None or not _is_column(steps := trace.get("step"), steps) or not steps or None in steps:
        return ""
    found: dict[str, Any] = {"step": steps}
    for name in _COLUMNS:
        column: Any = trace.get(name)
        if _is_column(column, steps) and any(number is not None for number in column):
            found[name] = column[0] if len(set(column)) == 1 else column
    if _is_lineage(lineage := trace.get("lineage"), len(steps)):
        found["lineage"] = lineage
    return encode(found).decode()


def _is_column(column: Any, steps: Any) -> bool:
    """Whether a column of a trace has a finite number or nothing for each step."""
    if not isinstance(column, list) or not isinstance(steps, list) or len(column) != len(steps):
        return False
    return all(number is None or (type(number) in (int, float) and math.isfinite(number)) for number in column)


def _is_lineage(lineage: Any, steps: int) -> bool:
    """Whether a trace says, at each step, which row each of the same number of particles continues."""
    if not isinstance(lineage, list) or len(lineage) != steps or not isinstance(lineage[0], list):
        return False
    count = len(lineage[0])
    whole = all(isinstance(kept, list) and len(kept) == count for kept in lineage)
    return whole and count > 1 and all(type(row) is int and 0 <= row < count for kept in lineage for row in kept)


def _estimate(mean: float, low: float, high: float) -> Estimate:
    known = math.isfinite(low) and math.isfinite(high)
    return {"mean": mean, "low": low if known else None, "high": high if known else None}


def _written(value: Any) -> str:
    """Returns a setting or a column as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
