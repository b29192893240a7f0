"""What one prediction step returns to the callbacks, and how it skips prompts that fail."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svdd import NotFinite, RewardError, UserError
from svdd.runs.rows import Prompt, ResultRow
from svdd.runs.secrets import redact
from svdd.runs.tracebacks import users_traceback

__all__ = ["Prediction", "predict_or_skip"]


@dataclass
class Prediction:
    """The images of a batch of prompts and what is known about each.

    A trace has prompt_index, image_index and columns, see `Trace`; a failure prompt_index, image_index (0), prompt,
    error and, if it came from the user's own code, traceback.
    """

    images: Tensor  # float [n, 3, h, w] in [0, 1], on the device that computed them
    rows: list[ResultRow]  # one per image, in the same order
    traces: list[dict[str, Any]] = field(default_factory=list)  # one per image whose sampler made choices
    failures: list[dict[str, Any]] = field(default_factory=list)  # one per prompt that could not be drawn


def predict_or_skip(
    predict: Callable[[list[Prompt]], Prediction], batch: list[Prompt], is_fatal: Callable[[Exception], bool]
) -> Prediction:
    """Draws a batch; if it fails, draws its prompts one by one and skips those that fail alone too.

    An error is raised if `is_fatal` says that it would occur for every prompt, such as a device without memory, or if
    it is a UserError other than a RewardError or NotFinite.
    """
    try:
        return predict(batch)
    except Exception as error:
        if is_fatal(error) or (isinstance(error, UserError) and not isinstance(error, RewardError | NotFinite)):
            raise
        found = {"error": redact(f"{type(error).__name__}: {error}")}
        if traceback := users_traceback(error):
            found["traceback"] = traceback
    if len(batch) == 1:
        failure = {"prompt_index": batch[0].index, "image_index": 0, "prompt": batch[0].text, **found}
        return Prediction(torch.zeros(0, 3, 1, 1), [], failures=[failure])
    parts = [predict_or_skip(predict, [prompt], is_fatal) for prompt in batch]
    return Prediction(
        torch.cat([part.images for part in parts if part.rows] or [parts[0].images]),
        [row for part in parts for row in part.rows],
        [trace for part in parts for trace in part.traces],
        [failure for part in parts for failure in part.failures],
    )
