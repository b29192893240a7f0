"""Plain sampling from the pretrained model: the baseline, and the limit of every other sampler."""

from svdd.samplers.base import Sampler
from svdd.state.state import Start, State
from svdd.values.base import Value

__all__ = ["Unguided"]


class Unguided(Sampler):
    """Plain sampling, without any selection.

    1. start from noise
    2. for each step i: x_{i+1} ~ N(mean_i(x_i), std_i^2 I)

    Costs T denoiser rows per image.
    """

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the chain; the value is not used."""
        state = start()
        while not state.done:
            state = state.propose()
        return state
