"""What one prediction step returns to the callbacks."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from svdd.runs.rows import ResultRow

__all__ = ["Prediction"]


@dataclass
class Prediction:
    """The images of a batch of prompts and what is known about each.

    Args:
        images: float [n, 3, h, w] in [0, 1], on the CPU.
        rows: One per image, in the same order.
        traces: One per image whose sampler made choices: prompt_index, image_index and columns, see `Trace`.
        failures: One per prompt that could not be drawn: prompt_index, image_index (0), prompt, error.
    """

    images: Tensor
    rows: list[ResultRow]
    traces: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
