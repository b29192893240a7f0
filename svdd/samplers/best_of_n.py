"""Best-of-N: the standard baseline at equal compute."""

from svdd.samplers.base import Sampler, require_at_least_one
from svdd.samplers.toolbox.selection import choice_kl, top
from svdd.state.state import Start, State
from svdd.values.base import Value

__all__ = ["BestOfN"]


class BestOfN(Sampler):
    """Best of N independent images by the reward.

    1. draw N chains from the pretrained model
    2. return the one whose image has the highest reward

    Costs N T denoiser rows per image.

    Args:
        num_particles: N, images drawn for each one returned.

    Raises:
        ValueError: If `num_particles` is below 1.
    """

    budget_argument = "num_particles"

    def __init__(self, num_particles: int = 20) -> None:
        require_at_least_one(num_particles=num_particles)
        self.num_particles = num_particles

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of N chains for each image."""
        state = start(self.num_particles)
        while not state.done:
            state = state.propose()
        if self.num_particles == 1:
            return state
        v = self.evaluate(value, state)
        return self.keep(state, top(v), v, kl=choice_kl(v, alpha=0))
