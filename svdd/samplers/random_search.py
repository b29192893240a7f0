"""Random search over the initial noise.

Target: the initial noise whose chain ends in the highest reward.
Source: Ma et al., Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, 2025, arXiv 2501.09732.
"""

from svdd.samplers.base import Sampler, require_at_least_one
from svdd.samplers.toolbox.selection import choice_kl, top
from svdd.state.state import Start, State
from svdd.values.base import Value

__all__ = ["RandomSearch"]


class RandomSearch(Sampler):
    """Random search over the initial noise: N starts, the best end.

    1. draw N starts and run each to its end, all with the same noise in the steps, so that the start alone decides
    2. return the end of the highest reward

    On a chain without noise this is `BestOfN`. Costs N T denoiser rows per image.

    Args:
        num_candidates: N, starts of each image.

    Raises:
        ValueError: If `num_candidates` is below 1.
    """

    budget_argument = "num_candidates"

    def __init__(self, num_candidates: int = 8) -> None:
        require_at_least_one(num_candidates=num_candidates)
        self.num_candidates = num_candidates

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of N starts for each image."""
        state = start(self.num_candidates)
        state = state.replay(state.x)
        while not state.done:
            state = state.propose()
        if self.num_candidates == 1:
            return state
        v = self.evaluate(value, state)
        return self.keep(state, top(v), v, kl=choice_kl(v, alpha=0))
