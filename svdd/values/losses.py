"""What a learned value is trained on: which target a state has, and which average of it the value becomes.

A state x_i of a rollout ended in an image of reward r. Regressing on r with a square makes the value the mean
E[r | x_i]; the soft value alpha log E[exp(r / alpha) | x_i] needs another loss. Both may bootstrap: regress on the
value of the next state instead, and on r only at the end of the chain.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["MeanLoss", "SoftLoss", "ValueLoss"]

_LARGEST_EXPONENT = 4.0  # beyond, the loss goes on along its tangent, so that one outlier cannot blow up a batch


class ValueLoss(ABC):
    """Compares estimates with targets.

    Args:
        bootstrap: Take the value of the next state of the rollout as the target (temporal difference), the reward only
            for the last one. Needs every step of the rollouts.
    """

    def __init__(self, bootstrap: bool = False) -> None:
        self.bootstrap = bootstrap

    @abstractmethod
    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean loss of a batch, a scalar.

        Args:
            values: Estimates in units of `scale`, [n].
            targets: Rewards, or values of the next states, in the same units, [n].
            scale: The rewards' standard deviation, in units of the reward.
        """


class MeanLoss(ValueLoss):
    """(target - value)^2: the value becomes E[r | x_i] (Li et al., 2024, arXiv 2408.08252, Algorithm 3)."""

    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean square."""
        return (targets - values).square().mean()


class SoftLoss(ValueLoss):
    """exp(u) - u - 1 with u = (target - value) / alpha: the value becomes alpha log E[exp(r / alpha) | x_i].

    The expectation of its derivative vanishes where E[exp((r - v) / alpha)] = 1. No exponential of a reward is ever
    formed, only of a residual, and the loss is continued linearly beyond u = 4.

    Source: the linear-exponential loss of Garg et al., Extreme Q-Learning, 2023, arXiv 2301.02328.

    Args:
        alpha: Temperature in units of the reward, above 0: that of the sampler that will use the value.
        bootstrap: As in every loss.

    Raises:
        ValueError: If `alpha` is not above 0.
    """

    def __init__(self, alpha: float, bootstrap: bool = False) -> None:
        super().__init__(bootstrap)
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha}; the limit of a high alpha is MeanLoss")
        self.alpha = alpha

    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean, in units in which it is the square for a high alpha."""
        u = (targets - values) * (scale / self.alpha)
        near = u.clamp(max=_LARGEST_EXPONENT)
        beyond = (u - near) * (torch.tensor(_LARGEST_EXPONENT).exp() - 1)
        return 2 * (self.alpha / scale) ** 2 * (near.exp() - near - 1 + beyond).mean()
