"""Random search over the initial noise.

Target: the start whose chain ends in the highest reward.
Source: Ma et al., Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, 2025, arXiv 2501.09732.
"""

from svdd.samplers.base import Sampler, Start, State, Value, require_at_least_one

__all__ = ["RandomSearch"]


class RandomSearch(Sampler):
    """Random search over the initial noise: the best end of N starts, for N T denoiser rows per image.

    1. draw N starts and run each to its end, all with the same noise in the steps, so that only the starts differ
    2. return the end of the highest reward

    As published where the chain is deterministic, eta = 0 (the paper's is an ODE), and then the same as `BestOfN`.
    Sharing the noise of the steps at eta > 0 is an addition.

    Args:
        num_candidates: N, starts of each image.
    """

    budget_argument = "num_candidates"
    num_kept = 1

    def __init__(self, num_candidates: int = 8) -> None:
        require_at_least_one(num_candidates=num_candidates)
        self.num_candidates = num_candidates

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of N starts for each image."""
        state = start(self.num_candidates)
        return self.keep_best(self.finish(state.replay(state.x)), value)
