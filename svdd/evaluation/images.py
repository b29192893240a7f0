"""The images of a finished run as statistics see them: one entry each, also where a sampler returned all particles."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from svdd.evaluation.metrics.intervals import mean_of
from svdd.runs.folder import RunFolder

__all__ = ["RunImage", "read_images"]


class RunImage(NamedTuple):
    """One image; if there are several weighted particles of it, their means and the file of the heaviest."""

    prompt: str
    file: str
    rewards: dict[str, float]
    denoiser_rows: float | None  # this and the next per picture; None if it is not recorded
    network_rows: float | None


class _Row(NamedTuple):
    weight: float
    image: RunImage


def read_images(run: Path) -> dict[tuple[int, int], RunImage]:
    """Returns the images of a run by prompt and image number, in order; raises a UserError if a row is damaged.

    Of several rows about one picture, the last counts. An image has the rewards that all its particles have.
    """
    rows: dict[tuple[int, int], dict[int, _Row]] = defaultdict(dict)
    for row in RunFolder(run).rows(checked=True):
        particle = row.get("particle", 0)
        spent = row.get("ledger", {})
        counts = spent.get("denoiser_rows"), spent.get("network_rows")
        image = RunImage(row["prompt"], row["file"], row["rewards"], *counts)
        first = row["image_index"] - particle
        rows[row["prompt_index"], first][particle] = _Row(row.get("particle_weight", 1.0), image)
    return {
        (prompt, first // len(members)): _merged([*members.values()])
        for (prompt, first), members in sorted(rows.items())
    }


def _merged(particles: list[_Row]) -> RunImage:
    """Returns the weighted means of an image's particles; without any weight, the plain means."""
    best = max(particles, key=lambda row: row.weight).image
    if len(particles) == 1:
        return best
    weights = [row.weight for row in particles] if any(row.weight for row in particles) else [1.0] * len(particles)
    names = [name for name in best.rewards if all(name in row.image.rewards for row in particles)]
    rewards = {
        name: mean_of([(row.image.rewards[name], weight) for row, weight in zip(particles, weights, strict=True)])
        for name in names
    }
    return best._replace(rewards=rewards)
