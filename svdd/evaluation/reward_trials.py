"""What a reward is tried on: pictures, and their scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svdd.rewards.base import Reward

__all__ = ["Failed", "Skipped", "Trial", "drawn"]


class Failed(Exception):
    """A check that does not hold; the message says what to do."""


class Skipped(Exception):
    """A check that does not apply, or says nothing; the message says why."""


@dataclass
class Trial:
    """A reward, and pictures to try it on.

    Args:
        reward: The reward, on its device.
        images: At least two pictures, float32 [n, 3, h, w] in [0, 1], that differ in their scores.
        prompts: Their n prompts.
        remake: Builds the same reward once more, as another process or a later run does; None skips those checks.
        tolerance: How much rounding may change a score: of its size, and at least of 1.
    """

    reward: Reward
    images: Tensor
    prompts: Sequence[str]
    remake: Callable[[], Reward] | None = None
    tolerance: float = 1e-5

    @cached_property
    def scores(self) -> Tensor:
        """The scores of all pictures, float32 [n]."""
        return self.score()

    def score(self, images: Tensor | None = None, rows: Sequence[int] | None = None) -> Tensor:
        """Returns the scores of some rows of the pictures, or of others with the same prompts."""
        images = self.images if images is None else images
        rows = range(len(images)) if rows is None else rows
        return self.reward.score(images[list(rows)], [self.prompts[k % len(self.prompts)] for k in rows]).cpu()

    def close(self, scores: Tensor, expected: Tensor) -> bool:
        """Whether scores are the same but for rounding."""
        return torch.allclose(scores, expected, rtol=self.tolerance, atol=self.tolerance)

    def require_spread(self) -> None:
        """Skips a check that equal scores would pass in any case."""
        if self.scores.std() <= 2 * self.tolerance:
            raise Skipped(f"all pictures score {self.scores[0]:.4g}: give others with --images and --prompts")


def drawn(size: int = 64) -> tuple[Tensor, list[str]]:
    """Returns four pictures of shapes, float32 [4, 3, size, size] with 8-bit values, and their prompts."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    shapes = {
        "a red disc on a white background": (x**2 + y**2 < 0.4, (0.9, 0.1, 0.1), torch.ones(3, size, size)),
        "a blue square on a grey background": ((x.abs() + 0.1).maximum(y.abs()) < 0.5, (0.1, 0.2, 0.8), y * 0.2 + 0.5),
        "green stripes": ((8 * x).sin() > 0, (0.1, 0.6, 0.2), 0.6 + 0.4 * noise),
        "a yellow triangle in the night": ((y < 0.6) & (y > 2 * x.abs() - 0.7), (0.95, 0.85, 0.1), 0.2 * noise),
    }
    pictures = [
        torch.where(where, torch.tensor(colour)[:, None, None], around.expand(3, size, size))
        for where, colour, around in shapes.values()
    ]
    return (torch.stack(pictures).clamp(0, 1) * 255).round() / 255, list(shapes)
