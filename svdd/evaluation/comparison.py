"""What `svdd compare` prints: the settings that differ between runs, and a table of their means and differences."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svdd.evaluation.baseline import compare, difference_words, prompt_means
from svdd.evaluation.metrics.intervals import standard_error
from svdd.evaluation.rendering import Cell, Form
from svdd.evaluation.sides import WORK, Positions, Side
from svdd.runs.config import HARMLESS, HARMLESS_IF_REPRODUCIBLE

__all__ = ["comparison_table", "differing_settings", "distinct_names"]

_MOST_LETTERS = 40  # of a setting
_WORK = {"denoiser_rows": "denoiser rows", "network_rows": "network rows", "seconds": "seconds"}  # as in WORK


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Returns the folders' names, or as much of the end of their paths as tells them apart from the others."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    counts = [1] * len(runs)
    while True:
        names = ["/".join(each[-count:]).lstrip("/") for each, count in zip(parts, counts, strict=True)]
        seen = Counter(names)
        longer = [
            count + (seen[name] > 1 and count < len(each))
            for name, count, each in zip(names, counts, parts, strict=True)
        ]
        if longer == counts:
            return names
        counts = longer


def differing_settings(sides: Sequence[Side]) -> tuple[list[str], list[list[Cell]]]:
    """Returns headers and rows: a row for each setting that differs and may affect images or scores."""
    sides = [side for side in sides if side.settings]
    reproducible = all(side.reproducible for side in sides)
    harmless = HARMLESS_IF_REPRODUCIBLE if reproducible else HARMLESS
    rows: list[list[Cell]] = []
    for key in dict.fromkeys(key for side in sides for key, value in side.settings.items() if value != {}):
        values = [side.settings.get(key) for side in sides]
        if not harmless.fullmatch(key) and any(value != values[0] for value in values):
            rows.append([key.removesuffix(".class_path"), *map(_short, values)])
    return ["setting", *(side.name for side in sides)], rows


def comparison_table(
    sides: Sequence[Side], base: int, positions: Sequence[Positions] | None, form: Form
) -> tuple[list[str], list[list[Cell]]]:
    """Returns headers and rows: a row for each run, with its means, differences to one of them, and costs.

    csv has a column for each number. A reward that some of a run's images lack is blank, and so is a difference to or
    from such a reward, or one that was measured with other weights.

    Args:
        sides: The runs.
        base: The position of the one with which the others are compared.
        positions: The paired images of each; None compares all images without pairs.
        form: The form of the table.
    """
    order = [base, *(k for k in range(len(sides)) if k != base)]
    chosen = [np.arange(len(side.keys)) for side in sides] if positions is None else positions
    found = compare(
        sides[base], [sides[k] for k in order[1:]], None if positions is None else [chosen[k] for k in order]
    )
    differences = dict(zip(order[1:], found, strict=True))
    rewards = list(dict.fromkeys(name for side in sides for name in side.rewards))
    headers, rows = ["run", "prompts", "images"], []
    for k, (side, places) in enumerate(zip(sides, chosen, strict=True)):
        cells: list[Cell] = [side.name, len(np.unique(side.texts[places])), len(places)]
        for name in rewards:
            cells += _reward_cells(side, places, name, differences.get(k, {}), form, len(sides) > 1)
        for name in WORK:
            values = side.work.get(name)
            mean = math.nan if values is None else float(values[places].mean())
            cells.append(mean if form == "csv" else None if math.isnan(mean) else f"{mean:.4g}")
        rows.append(cells)
    for name in rewards:
        extra = ["standard error", "difference", "low", "high"] if form == "csv" else [f"- {sides[base].name}"]
        extra = extra if len(sides) > 1 else extra[: form == "csv"]
        headers += [name, *(f"{name} {words}" for words in extra)]
    return [*headers, *(_WORK[name] for name in WORK)], rows


def _reward_cells(
    side: Side, places: Positions, name: str, differences: Mapping[str, Any], form: Form, several: bool
) -> list[Cell]:
    """Returns mean, standard error and difference of a reward; without `several` no difference."""
    mean = error = math.nan
    if name in side.rewards and not np.isnan(scores := side.rewards[name][places]).any():
        means = prompt_means(side.texts[places], scores).tolist()
        mean, error = math.fsum(means) / len(means), standard_error([[(each, 1.0)] for each in means])
    entry = differences.get(name)
    if form == "csv":
        numbers = [entry[key] if entry else None for key in ("difference", "ci95_low", "ci95_high")]
        return [mean, error, *(numbers if several else [])]
    shown = None if math.isnan(mean) else f"{mean:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else "")
    return [shown, *([difference_words(entry) if entry else None] if several else [])]


def _short(value: Any) -> str:
    """Returns a setting's value as short text; a class by its name."""
    if isinstance(value, dict):
        name = str(value.get("class_path", "")).rpartition(".")[2]
        given = value.get("init_args", {} if name else value)
        shown = ", ".join(f"{k}={_short(v)}" for k, v in given.items() if v is not None)
        text = f"{name}({shown})" if name else f"{{{shown}}}"
    elif isinstance(value, list):
        text = f"[{', '.join(map(_short, value))}]"
    else:
        text = "-" if value is None else str(value)
        text = text.rpartition(".")[2] if text.startswith("svdd.") else text
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
