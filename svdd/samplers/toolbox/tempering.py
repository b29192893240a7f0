"""Tempering: exponents lambda_i that rise from 0 at the start of the chain to 1 at its end.

The intermediate targets of a particle sampler are p_i(x_i) exp(lambda_i v_i(x_i) / alpha). Early values are inaccurate,
and a small exponent limits their effect.

Sources: Kim, Kim and Park, Test-time Alignment of Diffusion Models without Reward Over-optimization, 2025,
arXiv 2501.05803 (DAS: exponential and adaptive tempering); Jasra et al., Inference for Levy-Driven Stochastic
Volatility Models via Adaptive Sequential Monte Carlo, 2011 (the next exponent from the effective sample size).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from svdd.samplers.toolbox.selection import effective_sample_size

__all__ = ["SCHEDULES", "next_exponent"]

_HALVINGS = 40

SCHEDULES: dict[str, Callable[[float], float]] = {  # of i / T
    "none": lambda progress: 1.0,
    "linear": lambda progress: progress,
    # (1 + gamma)^i - 1 with the gamma that makes it end at 1
    "exponential": lambda progress: 2.0**progress - 1.0,
}


def next_exponent(log_w: Tensor, increment: Callable[[Tensor], Tensor], exponent: Tensor, target: float) -> Tensor:
    """Returns the largest next exponent whose weights keep the target effective sample size, by bisection.

    Args:
        log_w: Log-weights so far, [groups, rows].
        increment: From exponents [groups, 1] to the log-weights' increments, [groups, rows].
        exponent: The current exponents, [groups, 1], which are lower bounds.
        target: Effective sample size to keep, as a fraction of the rows; the exponent stays if it is already lower.

    Returns:
        float64 [groups, 1], at most 1.
    """
    wanted = target * log_w.shape[1]

    def enough(candidate: Tensor) -> Tensor:
        return effective_sample_size(log_w + increment(candidate))[:, None] >= wanted

    low, high = exponent.clone(), torch.ones_like(exponent)
    everything = enough(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        holds = enough(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where(everything, torch.ones_like(low), low)
