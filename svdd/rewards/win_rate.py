"""The share of the images drawn beside it that an image beats: a reward compared within a group.

Sources: Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952 (Biometrika 39), the model in which
preference rewards such as PickScore, HPSv2 and ImageReward are trained; at temperature 0 a sum of win rates orders
images as the count of Borda, 1781.
"""

import torch
from torch import Tensor

from svdd import require_numbers
from svdd.rewards.base import Reward
from svdd.rewards.conversion import RewardLike, as_reward

__all__ = ["WinRate"]


class WinRate(Reward):
    """Mean probability of being preferred to another image of the group by a reward, 0 to 1; alone 0.5.

    The probability that image a beats image b is sigmoid((r_a - r_b) / temperature). Groupwise: an image competes with
    the other candidates of its step, and in results with the other images of its prompt. All rewards get one scale, so
    that a `WeightedSum` of win rates needs no calibration.

    Args:
        reward: The reward that decides.
        temperature: In units of the reward, at least 0: 1 for the preferences that PickScore was trained on; at 0 the
            better image wins for certain and equal ones share the win, so that only ranks count.

    Raises:
        ValueError: If the temperature is negative or no number.
    """

    range, groupwise = (0.0, 1.0), True

    def __init__(self, reward: RewardLike, temperature: float = 0.0) -> None:
        super().__init__()
        require_numbers(temperature=temperature)
        if not temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        self.reward, self.temperature = as_reward(reward), float(temperature)
        self.variant = self.reward.name
        self.run_like(self.reward)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the win rate of each image against the others of the call, float32 [n]."""
        scores = self.reward.score(images, prompts).detach()
        if len(scores) == 1:
            return torch.full_like(scores, 0.5)
        lead = scores[:, None] - scores if self.reward.higher_is_better else scores - scores[:, None]
        wins = (lead / self.temperature).sigmoid() if self.temperature else (lead.sign() + 1) / 2
        return (wins.sum(1) - 0.5) / (len(scores) - 1)  # without the image itself
