"""GLASS transitions: draws from the exact law of a step, by several evaluations of the pretrained network.

Target: p(x' | x), where the noises of x and x' have the correlation rho; with DDPM's rho the exact reverse step.
Source: Holderrieth et al., GLASS Flows: Transition Sampling for Alignment of Flow and Diffusion Models, 2025, arXiv
2509.25170. The derivation is in docs/explanation/transitions.md.
"""

import math
from itertools import pairwise

from torch import Tensor

from svdd.diffusion.kernels.base import Kernel, Network, widen

__all__ = ["glass"]


def glass(kernel: Kernel, x: Tensor, x0: Tensor, noise: Tensor, i: int, network: Network) -> Tensor:
    """Returns draws of x at step i + 1.

    With g = rho sigma' / sigma, x' - g x is a_M x0 + s_M e, where a_M = alpha' - g alpha, s_M^2 = sigma'^2 (1 - rho^2).

    1. a_k and s_k, k = 0 .. M, lead straight from (0, alpha' + sigma') to (a_M, s_M); y <- s_0 noise
    2. for k < M: x0 <- the posterior mean given x and y = a_k x0 + s_k e (at k = 0 that of x, which is known);
       y <- a_{k+1} x0 + (s_{k+1} / s_k) (y - a_k x0)
    3. return g x + y

    One inner step is the Gaussian step of the kernel.

    Args:
        kernel: The chain, whose transition states M, `inner_steps`.
        x: Latents at step i, [n, ...].
        x0: Their posterior means.
        noise: Standard normal numbers of the same shape.
        i: The step.
        network: The network with guidance; each inner step but the first evaluates it once.
    """
    (alpha, sigma), (alpha_next, sigma_next) = kernel.levels[i], kernel.levels[i + 1]
    rho, inner_steps, start = kernel.rho(i), kernel.transition.inner_steps, alpha_next + sigma_next
    gain = rho * sigma_next / sigma
    weight, std = alpha_next - gain * alpha, sigma_next * math.sqrt(1 - rho**2)
    path = [(u * weight, (1 - u) * start + u * std) for u in (k / inner_steps for k in range(inner_steps + 1))]
    wide, y = widen(x), start * widen(noise)
    for k, ((a, s), (a_next, s_next)) in enumerate(pairwise(path)):
        if k > 0:
            precision = (alpha / sigma) ** 2 + (a / s) ** 2
            statistic = (alpha / sigma**2 * wide + a / s**2 * y) / precision
            x0 = kernel.denoise(statistic.to(x.dtype), math.sqrt(precision), network)
        y = a_next * x0 + s_next / s * (y - a * x0)
    return (gain * wide + y).to(x.dtype)
