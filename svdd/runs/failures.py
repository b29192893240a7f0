"""Draws a batch in which a prompt may fail: the prompts that fail are named, the others are drawn."""

from collections.abc import Callable

import torch

from svdd import RewardError, UserError
from svdd.rewards.base import is_device_failure
from svdd.runs.prediction import Prediction
from svdd.runs.prompts import Prompt

__all__ = ["draw_the_rest"]


def draw_the_rest(predict: Callable[[list[Prompt]], Prediction], batch: list[Prompt]) -> Prediction:
    """Draws a batch; where it fails, draws its prompts one by one, and leaves out those that fail alone too.

    What would fail for every prompt is no prompt's fault and is raised: a device that is out of memory or broken, and
    settings that cannot work.

    Args:
        predict: Draws and scores a batch.
        batch: Its prompts.
    """
    try:
        return predict(batch)
    except Exception as error:
        if _concerns_all(error):
            raise
        failure = error
    if len(batch) > 1:
        return _join([draw_the_rest(predict, [prompt]) for prompt in batch])
    row = {
        "prompt_index": batch[0].index,
        "image_index": 0,
        "prompt": batch[0].text,
        "error": f"{type(failure).__name__}: {failure}",
    }
    return Prediction(torch.zeros(0, 3, 1, 1), [], failures=[row])


def _concerns_all(error: Exception) -> bool:
    """Whether other prompts would fail in the same way."""
    if isinstance(error, UserError):
        return not isinstance(error, RewardError)
    return is_device_failure(error)


def _join(parts: list[Prediction]) -> Prediction:
    images = [part.images for part in parts if part.rows]
    return Prediction(
        torch.cat(images) if images else parts[0].images,
        [row for part in parts for row in part.rows],
        [trace for part in parts for trace in part.traces],
        [failure for part in parts for failure in part.failures],
    )
