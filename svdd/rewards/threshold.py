"""A reward as a constraint."""

from torch import Tensor

from svdd.rewards.base import Reward
from svdd.rewards.conversion import RewardLike, as_reward

__all__ = ["Threshold"]


class Threshold(Reward):
    """A constraint: 0 while the reward lies within the limits, else minus the distance to them.

    Args:
        reward: The reward to constrain.
        at_least: The lower limit.
        at_most: The upper limit.

    Raises:
        ValueError: If there is no limit, or `at_least` exceeds `at_most`.
    """

    from_files = ("at_least", "at_most")  # with other limits it is another reward

    def __init__(self, reward: RewardLike, at_least: float | None = None, at_most: float | None = None) -> None:
        super().__init__()
        reward = as_reward(reward)
        if at_least is None and at_most is None:
            raise ValueError("Threshold needs at_least, at_most or both, got neither")
        if at_least is not None and at_most is not None and at_least > at_most:
            raise ValueError(f"at_least must not exceed at_most, got {at_least} and {at_most}")
        self.reward, self.at_least, self.at_most = reward, at_least, at_most
        self.differentiable, self.groupwise, self.variant = reward.differentiable, reward.groupwise, reward.name
        self.run_like(reward)
        self.range = (-float("inf"), 0.0)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns minus the distance to the limits for each image, float32 [n]."""
        scores = self.reward.score(images, prompts)
        return -(scores - scores.clamp(self.at_least, self.at_most)).abs()
