"""What a study is: a grid of runs, each an ordinary run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Cell", "Study"]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        name: A unique name that is valid as that of a folder.
        guide: The group that the run is compared within: the name of its guide.
        variant: The name of its variant, which is the same for all budgets and guides.
        budget: The denoiser rows per image that were asked for; None for a variant that takes no budget.
        settings: Its settings by dotted keys, on top of the base configuration.
        folder: Its run folder.
    """

    name: str
    guide: str
    variant: str
    budget: int | None
    settings: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Study:
    """The runs of a study, and how they are compared.

    Args:
        cells: The runs, in the order of the file.
        baseline: The variant with which the others are compared; None if there is none.
        statistics: The columns of the table: any of mean, median, top10 and top20.
        folder: The folder of the study, which holds its tables and plots.
    """

    cells: list[Cell]
    baseline: str | None
    statistics: list[str]
    folder: Path
