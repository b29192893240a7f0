"""Tempering: exponents lambda_i that rise from 0 at the start of the chain to 1 at its end.

The intermediate targets of a particle sampler are p_i(x_i) exp(lambda_i v_i(x_i) / alpha). Early values are inaccurate,
and a small exponent limits their effect.

Sources: Kim, Kim and Park, 2025, arXiv 2501.05803 (DAS: exponential and adaptive tempering); Jasra et al., Inference
for Levy-Driven Stochastic Volatility Models via Adaptive Sequential Monte Carlo, 2011 (exponents from the ESS).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from svdd.samplers.toolbox.selection import effective_sample_size

__all__ = ["SCHEDULES", "next_exponent"]

SCHEDULES: dict[str, Callable[[float], float]] = {  # of i / T
    "none": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "exponential": lambda progress: 2.0**progress - 1.0,  # (1 + gamma)^i - 1 with the gamma that makes it end at 1
}


def next_exponent(log_w: Callable[[Tensor], Tensor], exponent: Tensor, size: float) -> Tensor:
    """Returns the largest next exponents at which the effective sample size is at least `size`, by bisection.

    Args:
        log_w: From exponents [groups, 1] to log-weights [groups, rows].
        exponent: The current exponents, float64 [groups, 1]; they stay where the size is already lower.
        size: Effective sample size to keep, 1 .. rows.

    Returns:
        float64 [groups, 1], at most 1.
    """
    one = torch.ones_like(exponent)
    low, high = exponent, one
    for _ in range(40):
        middle = (low + high) / 2
        enough = effective_sample_size(log_w(middle))[:, None] >= size
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(effective_sample_size(log_w(one))[:, None] >= size, one, low)
