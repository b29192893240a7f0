"""Several rewards at once."""

from typing import Any

import torch
from torch import Tensor, nn

from svdd.rewards.base import Reward
from svdd.rewards.conversion import RewardLike, as_reward

__all__ = ["WeightedSum"]


class WeightedSum(Reward):
    """A weighted sum of rewards. In a plain sum the reward with the largest spread dominates; see `ZScored`.

    Args:
        rewards: The rewards to add.
        weights: One factor for each, by default 1; negative if lower is better.
        label: Makes the name of the reward `WeightedSum-LABEL`, as several in one run need.

    Raises:
        ValueError: If there is no reward, or not one finite weight for each.
    """

    from_files = ("weights",)  # sums with other weights are other rewards

    def __init__(self, rewards: list[RewardLike], weights: list[float] | None = None, label: str = "") -> None:
        super().__init__()
        self.variant = label
        if not rewards:
            raise ValueError("WeightedSum needs at least one reward, got none")
        parts = [as_reward(reward, f"rewards[{k}]") for k, reward in enumerate(rewards)]
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(rewards) or not torch.tensor(self.weights).isfinite().all():
            raise ValueError(f"weights must be one finite number per reward ({len(rewards)}), got {weights}")
        self.rewards: Any = nn.ModuleList(parts)
        self.differentiable = all(reward.differentiable for reward in parts)
        self.groupwise = any(reward.groupwise for reward in parts)
        self.run_like(*parts)
        ends = [
            sorted(weight * end for end in reward.range) if weight else [0.0, 0.0]
            for reward, weight in zip(parts, self.weights, strict=True)
        ]
        self.range = (sum(low for low, _ in ends), sum(high for _, high in ends))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the sum for each image, float32 [n]."""
        scores = [reward.score(images, prompts) for reward in self.rewards]
        total = sum((w * s for w, s in zip(self.weights, scores, strict=True)), torch.zeros_like(scores[0]))
        return total if self.differentiable else total.detach()  # the gradient of some parts would mislead
