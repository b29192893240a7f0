"""A reward as a constraint."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdd.rewards.base import Reward

__all__ = ["Threshold"]


class Threshold(Reward):
    """A constraint: 0 while the reward lies within the limits, minus what it lacks outside.

    As a part of a `WeightedSum` with a large weight it keeps a reward from falling while others climb.

    Args:
        reward: What is limited.
        at_least: The lowest score that costs nothing.
        at_most: The highest score that costs nothing.

    Raises:
        ValueError: If there is no limit, or the two leave nothing between them.
    """

    def __init__(self, reward: Reward, at_least: float | None = None, at_most: float | None = None) -> None:
        super().__init__()
        if at_least is None and at_most is None:
            raise ValueError("Threshold needs at_least, at_most or both, got neither")
        if at_least is not None and at_most is not None and at_least > at_most:
            raise ValueError(f"at_least must not exceed at_most, got {at_least} and {at_most}")
        self.reward, self.at_least, self.at_most = reward, at_least, at_most
        self.differentiable = reward.differentiable
        self.range = (-float("inf"), 0.0)

    @property
    def name(self) -> str:
        """`Threshold-` and the reward's."""
        return f"Threshold-{self.reward.name}"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns minus the distance to the limits for each image, float32 [n]."""
        scores = self.reward.score(images, prompts)
        lack = torch.zeros_like(scores)
        if self.at_least is not None:
            lack = lack + (self.at_least - scores).clamp(min=0)
        if self.at_most is not None:
            lack = lack + (scores - self.at_most).clamp(min=0)
        return -lack
