"""Zero-order search over the initial noise: hill climbing without gradients.

Target: the start whose chain ends in the highest reward.
Source: Ma et al., Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, 2025, arXiv 2501.09732.
"""

import torch

from svdd.diffusion.base import per_row
from svdd.samplers.base import Sampler, Start, State, Value, require_at_least_one
from svdd.samplers.toolbox.selection import top

__all__ = ["ZeroOrderSearch"]


class ZeroOrderSearch(Sampler):
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
    num_kept = 1

    def __init__(
        self, num_iterations: int = 4, num_candidates: int = 4, radius: float = 0.5, decay: float = 0.7
    ) -> None:
        require_at_least_one(num_iterations=num_iterations, num_candidates=num_candidates)
        for name, share in (("radius", radius), ("decay", decay)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie above 0 and be at most 1, got {share}")
        self.num_iterations, self.num_candidates = num_iterations, num_candidates
        self.radius, self.decay = radius, decay

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the best start found for each image."""
        state = start()
        images, n = state.num_images, self.num_candidates
        best_start, best = state.x, self.finish(state.replay(state.x))
        best_value = self.evaluate(value, best)
        radius = per_row(state.x.new_full((images,), self.radius), state.x)
        for _ in range(self.num_iterations):
            new = state.context.diffusion.initial(state.context.perturbations(n).to(state.x))
            near = ((1 - radius**2).sqrt() * best_start).repeat_interleave(n, 0) + radius.repeat_interleave(n, 0) * new
            ends = self.finish(state.replay(near))
            v = torch.cat([best_value, self.evaluate(value, ends)], 1)
            index = top(v)
            starts = torch.cat([best_start[:, None], near.unflatten(0, (images, n))], 1)
            best_start = starts[torch.arange(images, device=index.device), index[:, 0]]
            best, best_value = self.keep(best.join(ends), index, v), v.gather(1, index)
            radius = torch.where(per_row(index[:, 0], radius) == 0, radius * self.decay, radius)
        return best
