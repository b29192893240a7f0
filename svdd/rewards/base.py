"""What every reward is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdd import RewardError, UserError
from svdd.rewards.identity import settings

__all__ = ["Reward", "is_device_failure"]


class Reward(nn.Module, ABC):
    """One number per image.

    A subclass implements `forward` and states what holds of its scores.

    Attributes:
        differentiable: Whether gradients flow from the scores to the images.
        higher_is_better: Sampling climbs, so a guide reward must be one of which more is better; a held-out reward
            may be an error, and is then summarised with the lowest as the best.
        range: The lowest and the highest score that can occur.
    """

    differentiable: bool = False
    higher_is_better: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def name(self) -> str:
        """What results call the reward."""
        return type(self).__name__

    @property
    def identity(self) -> Any:
        """What its scores depend on, for values that are learned from them: the name, and settings if there are any."""
        own = settings(self)
        return {"name": self.name, **own} if own else self.name

    def load(self) -> None:
        """Reads the weights of this reward and of those it is made of, if they have not been read.

        Scoring does so by itself.
        """
        for module in self.modules():
            if isinstance(module, Reward) and module is not self:
                module.load()

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
            RewardError: If they are not one finite number per image, or `forward` raised an error that is not the
                device's.
        """
        try:
            scores = self(images, prompts)
        except UserError:
            raise
        except Exception as error:
            if is_device_failure(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            raise RewardError(f"reward {self.name} failed with {type(error).__name__}: {reason}") from error
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


def is_device_failure(error: Exception) -> bool:
    """Whether a device has no memory left or is broken, which is nobody's fault who computes on it."""
    if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error" in said or "out of memory" in said.lower())
