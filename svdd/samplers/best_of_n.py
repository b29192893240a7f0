"""Best-of-N: sample N images, keep the one with the highest reward."""

from svdd.samplers.base import Sampler, Start, State, Value, require_at_least_one

__all__ = ["BestOfN"]


class BestOfN(Sampler):
    """Best of N independent images by the reward, for N T denoiser rows per image.

    1. draw N chains from the pretrained model
    2. return the end of the highest reward

    Args:
        num_particles: N, images drawn for each one returned.
    """

    budget_argument = "num_particles"
    num_kept = 1

    def __init__(self, num_particles: int = 20) -> None:
        require_at_least_one(num_particles=num_particles)
        self.num_particles = num_particles

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of N chains for each image."""
        return self.keep_best(self.finish(start(self.num_particles)), value)
