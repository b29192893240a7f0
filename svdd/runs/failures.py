"""Draws a batch in which some prompts may fail."""

from collections.abc import Callable

import torch

from svdd import RewardError, UserError
from svdd.runs.prediction import Prediction
from svdd.runs.prompts import Prompt

__all__ = ["predict_or_skip"]


def predict_or_skip(
    predict: Callable[[list[Prompt]], Prediction], batch: list[Prompt], is_fatal: Callable[[Exception], bool]
) -> Prediction:
    """Draws a batch; if it fails, draws its prompts one by one and skips those that fail alone too.

    Args:
        predict: Draws and scores a batch.
        batch: Its prompts.
        is_fatal: Whether an error would occur for every prompt, such as a device without memory; it is then raised. So
            is every UserError except a RewardError.
    """
    try:
        return predict(batch)
    except Exception as error:
        if is_fatal(error) or (isinstance(error, UserError) and not isinstance(error, RewardError)):
            raise
        failure = error
    if len(batch) > 1:
        return _join([predict_or_skip(predict, [prompt], is_fatal) for prompt in batch])
    row = {
        "prompt_index": batch[0].index,
        "image_index": 0,
        "prompt": batch[0].text,
        "error": f"{type(failure).__name__}: {failure}",
    }
    return Prediction(torch.zeros(0, 3, 1, 1), [], failures=[row])


def _join(parts: list[Prediction]) -> Prediction:
    images = [part.images for part in parts if part.rows]
    return Prediction(
        torch.cat(images) if images else parts[0].images,
        [row for part in parts for row in part.rows],
        [trace for part in parts for trace in part.traces],
        [failure for part in parts for failure in part.failures],
    )
