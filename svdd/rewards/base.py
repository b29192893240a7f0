"""What every reward is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdd.errors import RewardError

__all__ = ["Reward"]


class Reward(nn.Module, ABC):
    """One number per image; higher is better, for a reward is what sampling climbs.

    A subclass implements `forward` and, where gradients flow from scores to images, says `differentiable = True`.

    Attributes:
        differentiable: Whether `forward` is differentiable with respect to the images.
    """

    differentiable: bool = False

    @property
    def name(self) -> str:
        """What results call the reward."""
        return type(self).__name__

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score per image, float [n].

        Args:
            images: float [n, 3, h, w] in [0, 1].
            prompts: The prompt of each image.
        """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns `forward`'s scores as float32 [n], after checking them.

        Raises:
            RewardError: If they are not one finite number per image.
        """
        scores = self(images, prompts)
        expected = f"expected a tensor of shape [{len(images)}], one finite score per image"
        if not isinstance(scores, Tensor):
            raise RewardError(f"reward {self.name} returned a {type(scores).__name__}; {expected}")
        if scores.shape != (len(images),):
            raise RewardError(f"reward {self.name} returned shape {list(scores.shape)}; {expected}")
        scores = scores.float()
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).sum())
            first = prompts[int((~torch.isfinite(scores)).int().argmax())]
            raise RewardError(
                f"reward {self.name} returned NaN or infinity for {bad} of {len(images)} images, first for the prompt "
                f"{first!r}; {expected}"
            )
        return scores
