"""The result row: what a run records about one image, one JSON object per line."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, cast

__all__ = ["RESERVED_COLUMNS", "Prompt", "ResultRow", "result_row"]


class _Always(TypedDict):
    prompt_index: int
    image_index: int
    num_images: int
    prompt: str
    seed: int
    rewards: dict[str, float]
    ledger: dict[str, float]


class ResultRow(_Always, total=False):
    """What is known about one image, with the other columns of the prompt's source.

    Attributes:
        prompt_index: Position of the prompt in its source, from 0.
        image_index: Position of the image among those of its prompt, from 0.
        num_images: Number of images of the prompt.
        prompt: The prompt's text.
        seed: Seed of the image's noise.
        rewards: Score by reward, the guide first.
        ledger: Work done for the image: rows, calls and seconds.
        negative_prompt: What the image should not show.
        particle: Position among the particles that the sampler returned for one seed.
        particle_weight: Weight of that particle.
        path_kl: Divergence of the guided path from the model's own, in nats.
        file: Path of the image in the run folder, added when the image is written.
        sha256: Checksum of the image file, added when the image is written.
    """

    negative_prompt: str
    particle: int
    particle_weight: float
    path_kl: float
    file: str
    sha256: str


# Columns that a prompt source may not have, because they would overwrite a result.
RESERVED_COLUMNS = frozenset(ResultRow.__annotations__) - {"negative_prompt", "seed"}


class Prompt(NamedTuple):
    """One prompt and what its source says about it.

    Attributes:
        index: Position in the source, from 0, counting the prompts that were kept.
        text: The prompt, on one line.
        negative_prompt: What the image should not show; None if the source gives none.
        seed: The seed of the prompt's first image; None if the source gives none.
        extra: All other columns of the source, copied into the results.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    text: str
    negative_prompt: str | None
    seed: int | None
    extra: dict[str, Any]

    def image_seeds(self, seed: int, count: int) -> list[int]:
        """Returns the seeds of the prompt's images: seed + index * count + k, or the prompt's own seed + k.

        Args:
            seed: The seed of the run.
            count: Seeds to return, one per image; the same for all prompts.
        """
        first = seed + self.index * count if self.seed is None else self.seed
        return [(first + k) % 2**63 for k in range(count)]


def result_row(
    prompt: Prompt,
    image_index: int,
    num_images: int,
    seed: int,
    rewards: Mapping[str, float],
    ledger: Mapping[str, float],
    particle: tuple[int, float] | None = None,
    path_kl: float | None = None,
) -> ResultRow:
    """Builds the row of an image that is not yet written, with its columns in the order of the results file.

    The arguments are the fields of `ResultRow`; `particle` is the particle's position and its weight.
    """
    row: dict[str, Any] = {"prompt_index": prompt.index, "image_index": image_index, "num_images": num_images}
    row["prompt"] = prompt.text
    if prompt.negative_prompt is not None:
        row["negative_prompt"] = prompt.negative_prompt
    row |= prompt.extra
    row["seed"] = seed
    if particle is not None:
        row["particle"], row["particle_weight"] = particle
    row["rewards"] = rewards
    if path_kl is not None:
        row["path_kl"] = path_kl
    row["ledger"] = ledger
    return cast(ResultRow, row)
