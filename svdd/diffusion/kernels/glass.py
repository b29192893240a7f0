"""GLASS transitions: draws from the exact law of a step, by several evaluations of the pretrained network.

Target: p(x' | x), where the noises of x and x' have the correlation rho; with DDPM's rho the exact reverse step.
Source: Holderrieth et al., GLASS Flows: Transition Sampling for Alignment of Flow and Diffusion Models, 2025, arXiv
2509.25170. The derivation is in docs/transitions.md.
"""

import math

from torch import Tensor

from svdd.diffusion.kernels.base import Kernel, Network, widen

__all__ = ["glass"]


def glass(kernel: Kernel, x: Tensor, x0: Tensor, noise: Tensor, i: int, network: Network) -> Tensor:
    """Returns draws of x at step i + 1.

    1. y <- noise; r_k, k = 0 .. M, rises from 0 to (alpha' - g alpha) / std, with g = rho sigma' / sigma
    2. M times: x0 <- the posterior mean given x = alpha x0 + sigma e and y = r_k x0 + e' (known at k = 0);
       y <- y + (r_{k+1} - r_k) x0
    3. return g x + std y

    One inner step is the Gaussian step of the kernel.

    Args:
        kernel: The chain, whose transition states M, `inner_steps`.
        x: Latents at step i, [n, ...].
        x0: Their posterior means.
        noise: Standard normal numbers of the same shape.
        i: The step.
        network: The network with guidance; each inner step but the first evaluates it once.
    """
    (alpha, sigma), following = kernel.levels[i], kernel.levels[i + 1]
    rho, inner, scale = kernel.rho(i), kernel.transition.inner_steps, sum(following)
    std = following[1] * math.sqrt(1 - rho**2)
    gain = rho * following[1] / sigma
    weight = following[0] - gain * alpha
    # straight from pure noise to N(weight x0, std^2), in the coordinates in which alpha' + sigma' = 1
    ends = [k / inner for k in range(inner + 1)]
    ratios = [u * weight / ((1 - u) * scale + u * std) for u in ends]
    wide, y = widen(x), widen(noise)
    for k in range(inner):
        if k > 0:
            precision = (alpha / sigma) ** 2 + ratios[k] ** 2
            statistic = (alpha / sigma**2 * wide + ratios[k] * y) / precision
            x0 = kernel.denoise(statistic.to(x.dtype), math.sqrt(precision), network)
        y = y + (ratios[k + 1] - ratios[k]) * x0
    return (gain * wide + std * y).to(x.dtype)
