"""Soft value-based decoding: at every step draw candidates and keep those of high value.

Target: p(x) exp(r(x) / alpha), the pretrained model tilted by the reward.
Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding, 2024, arXiv 2408.08252, Algorithm 1.
"""

from svdd.diffusion.base import Diffusion
from svdd.samplers.base import Sampler, require_noise
from svdd.selection import choose
from svdd.state import State
from svdd.values.base import Value

__all__ = ["SVDD"]


class SVDD(Sampler):
    """Soft value-based decoding: M candidates per step, one kept in proportion to exp(value / alpha).

    1. for each step, for each of the b particles: draw M candidates x_{i+1} from the pretrained kernel
    2. v = value(candidates)
    3. keep b of each image's b M candidates in proportion to exp(v / alpha), at alpha = 0 the b best; at the last
       step, where the value is the reward of the image itself, keep one

    Costs b (1 + M (T - 1)) denoiser rows per image with a posterior-mean value, b T with a learned one.

    Args:
        num_candidates: M, children of a particle at every step (`duplicate_size` in the paper's code).
        alpha: Temperature in units of the reward; 0 takes the best.
        num_particles: b, particles kept per image; more than one makes a beam search.

    Raises:
        ValueError: If a count is below 1 or `alpha` is negative.
    """

    def __init__(self, num_candidates: int = 20, alpha: float = 0.0, num_particles: int = 1) -> None:
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be >= 1, got {num_candidates}")
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if num_particles < 1:
            raise ValueError(f"num_particles must be >= 1, got {num_particles}")
        self.num_candidates, self.alpha, self.num_particles = num_candidates, alpha, num_particles
        self.start_particles = num_particles

    def check(self, diffusion: Diffusion) -> None:
        """Raises UserError if candidates would all be the same."""
        require_noise(diffusion, "num_candidates", self.num_candidates)

    def sample(self, state: State, value: Value) -> State:
        """Returns the chosen end of the chain for each image."""
        while not state.done:
            candidates = state.propose(self.num_candidates if state.std > 0 else 1)
            keep = 1 if candidates.done else self.num_particles
            if len(candidates.x) == keep * candidates.num_images:  # nothing to choose from
                state = candidates
            else:
                v = self.evaluate(value, candidates)
                state = candidates.select(choose(v, self.alpha, keep, candidates.uniforms))
        return state

    def rows(self, num_inference_steps: int) -> int:
        """B (1 + M (T - 1))."""
        return self.num_particles * (1 + self.num_candidates * (num_inference_steps - 1))
