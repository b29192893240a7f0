"""Passes the numbers and sample images of a finished run to the configured loggers."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from svdd.runs.folder import RunFolder
from svdd.runs.pictures import pixels_of

__all__ = ["report"]

_SAMPLES = 16


def report(loggers: Iterable[Any], found: Mapping[str, Any], run: Path) -> None:
    """Logs nested numbers that are finite, flat, and a run's first images with their prompts to each Lightning logger.

    TensorBoard and Weights & Biases show images; other loggers get the numbers only.
    """
    numbers = dict(_flat(found))
    for logger in loggers:
        if numbers:
            logger.log_metrics(numbers)
        rows = list(islice(RunFolder(run).rows(checked=True), _SAMPLES))
        captions = [f"{row['prompt']} ({', '.join(f'{k} {v:.3g}' for k, v in row['rewards'].items())})" for row in rows]
        images = (pixels_of(run, row["file"]) for row in rows)
        if hasattr(logger, "log_image"):
            logger.log_image("samples", list(images), caption=captions)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
                logger.experiment.add_image(f"samples/{k}", image, dataformats="HWC")
                logger.experiment.add_text(f"samples/{k}", caption)
        logger.save()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)
