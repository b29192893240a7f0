"""Plain sampling from the pretrained model: the baseline, and the limit of every other sampler."""

from svdd.samplers.base import Sampler, Start, State, Value

__all__ = ["Unguided"]


class Unguided(Sampler):
    """Plain sampling, without any selection, for T denoiser rows per image.

    1. start from noise
    2. at each step x_{i+1} ~ N(mean_i(x_i), std_i^2 I)
    """

    num_kept = 0

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the chain; the value is not used."""
        return self.finish(start())
