"""Plain sampling from the pretrained model: the baseline, and what every sampler becomes in its limit."""

from svdd.samplers.base import Sampler
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["Unguided"]


class Unguided(Sampler):
    """Plain sampling: no choice is made.

    1. start from noise
    2. for each step i: x_{i+1} ~ N(mean_i(x_i), std_i^2 I)

    Costs T denoiser rows per image.
    """

    needs_value = False
    asks_on_the_way = False
    tells_path_kl = True

    def sample(self, state: State, value: Value) -> State:
        """Returns the end of the chain; the value is never asked."""
        while not state.done:
            state = state.propose()
        return state

    def rows(self, num_inference_steps: int) -> int:
        """T."""
        return num_inference_steps
