"""Reads a run that is finished, is still being drawn, or was killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdd import SUMMARY_FILE, UserError
from svdd.runs.command_line import continuing
from svdd.runs.config import read_config
from svdd.runs.files import regular_only
from svdd.runs.images import RunImages
from svdd.runs.json_lines import ShardedFile
from svdd.runs.rows import ResultRow, row_fault

__all__ = ["has_rows", "read_rows", "read_sampler", "read_summary"]


def has_rows(results: ShardedFile) -> bool:
    """Whether there is a file of result rows, merged or not; false of a name that no file can have."""
    try:
        return results.path.is_file() or bool(results.shards())
    except (OSError, ValueError):
        return False


def read_rows(run: Path, results: ShardedFile, images: RunImages, checked: bool = False) -> Iterator[ResultRow]:
    """Yields the rows of a run by prompt and image, of several rows about one image the newest.

    Rows of shards count if they are whole and their image exists; merged ones were compared with their images when the
    run began. With `checked`, rows have all that evaluation reads, in its type. Memory holds no merged row.

    Raises:
        UserError: If the folder holds no rows, a merged line is not JSON, or a checked row is damaged.
    """
    if not has_rows(results):
        recorded = read_config(run)
        advice = "give the --output folder of a `svdd predict`" if recorded is None else "wait until an image is drawn"
        if recorded is not None and recorded.kind == "study":
            advice = f"give the folders of runs in {run / 'cells'}"
        raise UserError(f"{run} holds no {results.path.name}; {advice}")
    try:
        for number, row in results.entries(images.is_there):
            if fault := "not JSON" if row is None else row_fault(row) if checked else "":
                where = (
                    f"{results.path}, line {number}" if number else f"a line of {results.path.stem}-*.jsonl in {run}"
                )
                raise UserError(f"{where} is damaged ({fault}); to draw the image again: {continuing(run)}")
            yield row
    except OSError as error:
        raise UserError(f"cannot read {results.path}: {error.strerror or error}") from error


def read_summary(run: Path) -> dict[str, Any]:
    """Returns the summary of a finished run; raises a UserError if there is none."""
    try:
        with open(run / SUMMARY_FILE, encoding="utf-8", opener=regular_only) as file:
            summary = json.load(file)
        if not isinstance(summary, dict):
            raise ValueError("not an object")
        return summary
    except (OSError, ValueError, RecursionError) as error:
        what = f"{run} has no readable {SUMMARY_FILE}"
        raise UserError(f"{what}; to finish the run: {continuing(run)}") from error


def read_sampler(run: Path) -> str:
    """Returns the name of a run's sampler, as its configuration or summary states it; a UserError if neither does."""
    recorded = read_config(run)
    tree: Any = recorded.config if recorded is not None else {}
    for name in ("model", "sampler", "class_path"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree.rpartition(".")[2] if isinstance(tree, str) else str(read_summary(run).get("sampler", ""))
