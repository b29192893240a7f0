"""The losses of a learned value: regression of a state's value on the reward of its rollout's final image."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from svdd import require_numbers

__all__ = ["MeanLoss", "SoftLoss", "ValueLoss"]

_LARGEST_EXPONENT = 12.0  # the loss continues along its tangent beyond: a state weighs at most 160,000 times another
_LARGEST_MEAN = 4.0  # of exp(u) over a batch, 1 at the soft value: beyond, the batch's gradient is scaled down


class ValueLoss(ABC):
    """Compares predictions with targets.

    Args:
        bootstrap: Use the value of the rollout's next state as the target (temporal difference), and the reward only
            for the last state. Needs every step of the rollouts.
    """

    def __init__(self, bootstrap: bool = False) -> None:
        self.bootstrap = bootstrap

    @abstractmethod
    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean loss of predictions [n] against targets [n], both in units of the spread `scale`."""


class MeanLoss(ValueLoss):
    """(target - value)^2: the value becomes E[r | x_i] (Li et al., 2024, arXiv 2408.08252, Algorithm 3)."""

    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean squared error."""
        return (targets - values).square().mean()


class SoftLoss(ValueLoss):
    """exp(u) - u - 1 with u = (target - value) / alpha: the value becomes alpha log E[exp(r / alpha) | x_i].

    Its expected derivative vanishes where E[exp((r - v) / alpha)] = 1. The loss is linear beyond u = 12. Where exp(u)
    averages more than 4 over a batch, the batch's gradient, not the loss, is scaled down, so that its entries sum to at
    most 10 alpha / scale. Source: the linear-exponential loss of Garg et al., 2023, arXiv 2301.02328.

    Args:
        alpha: Temperature in units of the reward, > 0; use the sampler's. Its lower limit: docs/reference/values.md.
        bootstrap: As in every loss.
    """

    def __init__(self, alpha: float, bootstrap: bool = False) -> None:
        super().__init__(bootstrap)
        require_numbers(alpha=alpha)
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha}; the limit of a high alpha is MeanLoss")
        self.alpha = alpha

    def __call__(self, values: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Returns the mean, float32 or wider, scaled so that it is the squared error for a high alpha."""
        exact = torch.promote_types(values.dtype, torch.float32)
        u = (targets.to(exact) - values.to(exact)) * (scale / self.alpha)
        near = u.clamp(max=_LARGEST_EXPONENT)
        beyond = (u - _LARGEST_EXPONENT).clamp(min=0) * math.expm1(_LARGEST_EXPONENT)
        loss = 2 * (self.alpha / scale) ** 2 * (near.exp() - near - 1 + beyond).mean()
        share = (_LARGEST_MEAN / near.detach().exp().mean()).clamp(max=1)
        return share * loss + (1 - share) * loss.detach()
