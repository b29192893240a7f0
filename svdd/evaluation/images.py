"""The images of a run as statistics see them: one entry each, also where a sampler returned all particles."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from svdd.evaluation.metrics.intervals import mean_of
from svdd.runs.folder import RunFolder
from svdd.runs.rows import ResultRow

__all__ = ["RunImage", "read_images", "stream_images"]


class RunImage(NamedTuple):
    """One image; if there are several weighted particles of it, their means and the file of the heaviest.

    The numbers of `denoiser_rows` to `seconds` are per picture. What the rows do not record is None.
    """

    prompt: str
    file: str
    rewards: dict[str, float]
    denoiser_rows: float | None = None
    network_rows: float | None = None
    gradient_rows: float | None = None
    seconds: float | None = None  # in the sampler
    seed: int | None = None
    path_kl_sample: float | None = None


class _Row(NamedTuple):
    weight: float
    image: RunImage


def read_images(run: Path) -> dict[tuple[int, int], RunImage]:
    """Returns the images of a run by prompt and image number, in order; raises a UserError if a row is damaged.

    Of several images of one number, the last counts. An image has the rewards that all its particles have.
    """
    return dict(sorted(stream_images(run), key=lambda pair: pair[0]))


def stream_images(run: Path) -> Iterator[tuple[tuple[int, int], RunImage]]:
    """Yields what `read_images` returns, in the order of the rows, of which memory holds those of one image."""
    rows = RunFolder(run).rows(checked=True)
    for (prompt, first), members in groupby(rows, lambda row: (row["prompt_index"], _first_particle(row))):
        particles = {row.get("particle", 0): _Row(row.get("particle_weight", 1.0), _image(row)) for row in members}
        yield (prompt, first // len(particles)), _merged([*particles.values()])


def _first_particle(row: ResultRow) -> int:
    return row["image_index"] - row.get("particle", 0)


def _image(row: ResultRow) -> RunImage:
    spent = row.get("ledger", {})
    return RunImage(
        row["prompt"],
        row["file"],
        row["rewards"],
        spent.get("denoiser_rows"),
        spent.get("network_rows"),
        spent.get("gradient_rows"),
        spent.get("total_seconds"),
        row.get("seed"),
        row.get("path_kl_sample"),
    )


def _merged(particles: list[_Row]) -> RunImage:
    """Returns the weighted means of an image's particles; without any weight, the plain means."""
    best = max(particles, key=lambda row: row.weight).image
    if len(particles) == 1:
        return best
    weights = [row.weight for row in particles] if any(row.weight for row in particles) else [1.0] * len(particles)

    def mean(numbers: list[float]) -> float:
        return mean_of([*zip(numbers, weights, strict=True)])

    names = [name for name in best.rewards if all(name in row.image.rewards for row in particles)]
    divergences = [row.image.path_kl_sample for row in particles]
    known = [number for number in divergences if number is not None]
    return best._replace(
        rewards={name: mean([row.image.rewards[name] for row in particles]) for name in names},
        path_kl_sample=mean(known) if len(known) == len(particles) else None,
    )
