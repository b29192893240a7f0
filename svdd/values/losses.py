"""What a learned value is trained on: which target a state has, and which average of it the value becomes.

A state x_i of a rollout ended in an image of reward r. Regressing on r with a square makes the value the mean
E[r | x_i]; the soft value alpha log E[exp(r / alpha) | x_i] needs another loss. Both may bootstrap: regress on the
value of the next state instead, and on r only at the end of the chain.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["MeanLoss", "SoftLoss", "ValueLoss"]

_LARGEST_EXPONENT = 12.0  # beyond, the loss goes on along its tangent: no state counts for more than 160,000 others
_LARGEST_MEAN = 4.0  # of exp(u) in a batch, 1 at the soft value: beyond, the gradient of the batch is scaled down


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
    formed, only of a residual. The loss goes on linearly beyond u = 12, and a batch in which exp(u) averages more than
    4 has its gradient, not its loss, scaled to what it is at 4: the gradients of a batch, which a low temperature would
    else begin with orders of magnitude more, add up to 10 alpha / scale at most.

    How low alpha may be depends on s, the spread of the targets that is left once x_i is known. The soft value of
    normal targets lies s^2 / (2 alpha) above their mean. In batches of 256 the value comes to lie as far above it down
    to alpha = s / 2, but 96 % as far at s / 3, 88 % at s / 4 and 50 % at s / 10, on the side of the mean. An average
    over samples without any bound does little better: 97 % at s / 4 and 65 % at s / 10 with 100,000 of them.

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
        """Returns the mean, float32 or wider, in units in which it is the square for a high alpha."""
        exact = torch.promote_types(values.dtype, torch.float32)
        u = (targets.to(exact) - values.to(exact)) * (scale / self.alpha)
        near = u.clamp(max=_LARGEST_EXPONENT)
        beyond = (u - _LARGEST_EXPONENT).clamp(min=0) * math.expm1(_LARGEST_EXPONENT)
        loss = 2 * (self.alpha / scale) ** 2 * (near.exp() - near - 1 + beyond).mean()
        share = (_LARGEST_MEAN / near.detach().exp().mean()).clamp(max=1)
        return share * loss + (1 - share) * loss.detach()
