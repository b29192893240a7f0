"""Prints the parity table of docs/reference/models.md: `python -m tests.tiny_families`.

Counts, for every family, the draws whose pictures equal the pipeline's bit for bit in float32: every law of the steps,
one and three pictures, two sizes.
"""

import inspect
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.tiny_families import FAMILIES, Family
from tests.tiny_families.drawing import GUIDANCE, Reference, build, draw

COLUMNS = ("model", "class", "lines", "network rows", "steps", "no guidance", "guidance", "negative prompts")


def equal(family: Family, folder: str, reference: Reference, guidance: str) -> str:
    """Returns how many draws are equal, of how many."""
    if guidance == "negative prompts" and not family.negative:
        return "-"
    found = []
    for step in family.steps:
        for size in (None, family.size):
            diffusion = build(family, folder, guidance, size, **step.ours)
            for images in (1, 3):
                expected = reference.draw(step, guidance, size, images)
                found.append(np.array_equal(draw(diffusion, guidance, images), expected))
    return f"{sum(found)} of {len(found)}"


def row(family: Family, folder: str) -> list[str]:
    """Returns the table's entries of a family."""
    reference = Reference(family, folder)
    lines = len(Path(inspect.getfile(reference.kind)).read_text().splitlines())
    names = ", ".join(step.name for step in family.steps)
    counts = [equal(family, folder, reference, guidance) for guidance in GUIDANCE]
    return [family.name, f"`{family.kind}`", str(lines), str(family.rows), names, *counts]


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            print("| " + " | ".join(row(family, family.save(Path(folder)))) + " |", flush=True)


if __name__ == "__main__":
    main()
