"""What every sampler is."""

from abc import ABC, abstractmethod

from torch import Tensor

from svdd.diffusion.base import Diffusion
from svdd.errors import UserError
from svdd.state import State
from svdd.values.base import Value

__all__ = ["Sampler", "require_noise"]


class Sampler(ABC):
    """Drives a state from noise to the end of the chain, choosing with a value.

    Attributes:
        start_particles: Rows per image of the state that `sample` wants.
        needs_value: Whether `sample` asks the value at all.
    """

    start_particles: int = 1
    needs_value: bool = True

    @abstractmethod
    def sample(self, state: State, value: Value) -> State:
        """Returns the state at the end of the chain, one row per image.

        Args:
            state: The start, with `start_particles` rows per image.
            value: Estimates how good a row will turn out; at the end of the chain it is the reward itself.
        """

    @abstractmethod
    def rows(self, num_inference_steps: int) -> int:
        """Returns the denoiser rows that `sample` spends per returned image with a posterior-mean value."""

    def check(self, diffusion: Diffusion) -> None:  # noqa: B027 (most samplers work on every chain)
        """Raises UserError if the sampler cannot work on this chain."""

    @staticmethod
    def evaluate(value: Value, state: State) -> Tensor:
        """Returns the values of a state's rows, one group per image: [images, rows per image]."""
        values = value(state).view(state.num_images, -1)
        state.context.report(state.i, float(values.mean()))
        return values


def require_noise(diffusion: Diffusion, name: str, count: int) -> None:
    """Raises UserError where several candidates would be copies of one because no step draws noise."""
    if count > 1 and not diffusion.stochastic:
        raise UserError(
            f"{name}={count} needs a chain with noise: with eta=0 every step is deterministic and all {count} "
            "candidates of a particle are the same image; set eta above 0 (1.0 as in the paper), or use BestOfN"
        )
