"""A reward for warm images."""

from collections.abc import Sequence

from torch import Tensor

from svdd.rewards import Reward

__all__ = ["Warmth"]


class Warmth(Reward):
    """Mean of red minus the mean of blue: images in warm light score high.

    Args:
        strength: Factor on the score.
    """

    differentiable = True

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.range = (-abs(strength), abs(strength))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score per image, float [n]."""
        return self.strength * (images[:, 0] - images[:, 2]).mean((1, 2))
