"""Zero-order search over the initial noise: hill climbing without gradients.

Target: the start whose chain ends in the highest reward.
Source: Ma et al., Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, 2025, arXiv 2501.09732.
"""

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from svdd.samplers.base import State, require_at_least_one, require_shares
from svdd.samplers.start_search import StartSearch, blend

__all__ = ["ZeroOrderSearch"]


class ZeroOrderSearch(StartSearch):
    """Zero-order search over the initial noise: neighbours of the best start so far, the best of them next.

    1. run the first start to its end: the incumbent
    2. K times: draw N neighbours sqrt(1 - radius^2) start + radius noise and run each to its end, all with the same
       noise in the steps; the best of them and the incumbent is the next incumbent; if it stays, radius <- decay radius
    3. return the incumbent's end

    The pivot, its N neighbours and the K iterations are the paper's. There the neighbours lie at a fixed distance, the
    chain is an ODE, and the best neighbour is the next pivot. Additions here: neighbours that are standard normal like
    the start, shared step noise at eta > 0, an incumbent that only a better neighbour replaces, and the decay of the
    radius. Costs (1 + K N) T denoiser rows per image.

    Args:
        num_iterations: K, moves of the incumbent.
        num_candidates: N, neighbours of each move.
        radius: Share of new noise in the first neighbours, above 0, at most 1; 1 draws independent starts.
        decay: Factor on the radius after a move that found nothing better, above 0, at most 1.
    """

    budget_argument = "num_iterations"

    def __init__(
        self, num_iterations: int = 4, num_candidates: int = 4, radius: float = 0.5, decay: float = 0.7
    ) -> None:
        require_at_least_one(num_iterations=num_iterations)
        super().__init__(num_iterations, num_candidates, num_starts=1, num_elites=1)
        require_shares(radius=radius, decay=decay)
        self.radius, self.decay = radius, decay

    def children(self, elites: Tensor, failures: Tensor, state: State) -> Tensor:
        """Returns neighbours of the best start."""
        context = state.context
        noise = context.diffusion.initial(context.perturbations(self.num_candidates).to(elites))
        noise = noise.unflatten(0, (len(elites), -1))
        radii = accumulate([self.decay] * self.num_generations, mul, initial=elites.new_tensor(self.radius))
        return blend(elites, noise, torch.stack([*radii])[failures.long()]).flatten(0, 1)
