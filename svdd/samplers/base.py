"""What every sampler is."""

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.samplers.toolbox.selection import effective_sample_size
from svdd.samplers.toolbox.window import Window
from svdd.state.state import State
from svdd.state.trace import Choice, count_distinct
from svdd.values.base import Value

__all__ = ["Sampler", "require_at_least_one", "require_gradient", "require_guided_step", "require_noise"]


class Sampler(ABC):
    """Drives a state from noise to the end of the chain, choosing with a value.

    A subclass keeps every constructor argument as an attribute of the same name.

    Attributes:
        start_particles: Rows per image of the state that `sample` wants.
        returned: Rows per image of the state that `sample` returns.
        needs_value: Whether `sample` asks the value at all.
        needs_gradient: Whether `sample` differentiates the value.
        budget_argument: The constructor argument, a count, that a budget of denoiser rows determines; None if no
            argument bears on the cost.
        asks_on_the_way: Whether `sample` asks the value before the end of the chain.
        tells_path_kl: Whether `sample` enters into the trace how far it leaves the pretrained chain.
    """

    start_particles: int = 1
    returned: int = 1
    needs_value: bool = True
    needs_gradient: ClassVar[bool] = False
    budget_argument: ClassVar[str | None] = None
    asks_on_the_way: ClassVar[bool] = True
    tells_path_kl: bool = False

    @abstractmethod
    def sample(self, state: State, value: Value) -> State:
        """Returns the state at the end of the chain, `returned` rows per image.

        Args:
            state: The start, with `start_particles` rows per image.
            value: Estimates how good a row will turn out; at the end of the chain it is the reward itself.
        """

    @abstractmethod
    def rows(self, num_inference_steps: int) -> int:
        """Returns the denoiser rows that `sample` spends per image of the batch with a posterior-mean value."""

    def rows_of_free_value(self, num_inference_steps: int) -> int:
        """Returns the denoiser rows per image with a value that needs none; by default as many as `rows`."""
        return self.rows(num_inference_steps)

    def most_rows(self, num_inference_steps: int, value_rows: int = 1) -> int:
        """Returns the most denoiser rows that `sample` may spend per image.

        Args:
            num_inference_steps: T.
            value_rows: `Value.most_rows`. At 0 and 1 the number is exact.
        """
        if value_rows == 0:
            return self.rows_of_free_value(num_inference_steps)
        return self.rows(num_inference_steps) * (value_rows if self.asks_on_the_way else 1)

    def check(self, diffusion: Diffusion, value: Value) -> None:  # noqa: B027 (most samplers work with everything)
        """Raises UserError if the sampler cannot work on this chain or with this value."""

    def within(self, budget: int, num_inference_steps: int, value_rows: int = 1) -> "Sampler":
        """Returns this sampler with the largest count whose cost does not exceed a budget.

        Where the count does not bear on the cost, it stays as it is.

        Args:
            budget: Denoiser rows per returned image.
            num_inference_steps: T.
            value_rows: `Value.most_rows` of the value that the sampler will ask.

        Raises:
            UserError: If even the smallest count exceeds the budget, or the budget determines no count.
        """
        name, kind = self.budget_argument, type(self).__name__
        if self.returned > 1:
            raise UserError(
                f"budget={budget} cannot choose {kind}'s {name}: every particle is returned, so each image costs the "
                "same whatever their number; set it yourself, or return one image"
            )

        def with_count(count: int) -> Sampler:
            if name is None:
                return self
            arguments = {key: getattr(self, key) for key in inspect.signature(type(self)).parameters}
            return type(self)(**arguments | {name: count})

        def cost(count: int) -> int:
            return with_count(count).most_rows(num_inference_steps, value_rows)

        if cost(1) > budget:
            least = f"{kind} with {name}=1" if name else kind
            raise UserError(
                f"budget={budget} is too small: {least} spends {cost(1)} denoiser rows per image at "
                f"num_inference_steps={num_inference_steps}; raise the budget or lower num_inference_steps"
            )
        if name is None or cost(max(2, getattr(self, name))) == cost(1):
            return self
        low, high = 1, 2
        while high <= budget and cost(high) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle)
        return with_count(low)

    @staticmethod
    def evaluate(value: Value, state: State) -> Tensor:
        """Returns the values of a state's rows, one group per image: [images, rows per image]."""
        values = value(state).view(state.num_images, -1)
        state.context.report(state.i, float(values.detach().mean()))
        return values

    @staticmethod
    def keep(
        state: State,
        index: Tensor,
        values: Tensor,
        log_w: Tensor | None = None,
        log_normaliser: Tensor | None = None,
    ) -> State:
        """Selects rows of every image, as `State.select` does, and enters the choice into the trace.

        Args:
            state: The rows to choose from.
            index: The rows to keep, int64 [images, k].
            values: What the choice was made by, [images, rows].
            log_w: The weights behind it, if there are any, [images, rows]: their effective sample size is traced.
            log_normaliser: What the choice adds to the estimate of log Z, if there is one, [images].
        """
        kept = state.select(index)
        ancestors = count_distinct(kept.origin.view(state.num_images, -1))
        ess = None if log_w is None else effective_sample_size(log_w)
        state.context.trace.choices.append(Choice(state.i, values, index, ancestors, ess, log_normaliser))
        return kept


def require_noise(diffusion: Diffusion, name: str, count: int) -> None:
    """Raises UserError where several candidates would be copies of one because no step draws noise."""
    if count > 1 and not diffusion.stochastic:
        raise UserError(
            f"{name}={count} needs a chain with noise: with eta=0 every step is deterministic and all {count} "
            "candidates of a particle are the same image; set eta above 0 (1.0 as in the paper), or use BestOfN"
        )


def require_guided_step(diffusion: Diffusion, window: Window) -> None:
    """Raises UserError where no step of a window draws noise, so that there would never be a choice."""
    steps = diffusion.num_inference_steps
    if not any(window.guides(i, steps) and diffusion.std(i) > 0 for i in range(steps)):
        raise UserError(
            f"no step would be guided: guide_start={window.start}, guide_stop={window.stop} and guide_every="
            f"{window.every} leave no step with noise at num_inference_steps={steps} (the last step of ddpm and "
            "euler_ancestral has none); widen the window"
        )


def require_gradient(sampler: Sampler, value: Value) -> None:
    """Raises UserError, by name, where a value has no gradient."""
    if not value.differentiable:
        raise UserError(
            f"{type(sampler).__name__} needs gradients, and {value.describe()} is not differentiable; use a "
            "differentiable reward such as CLIPScore, or a sampler that needs none, such as SVDD or SMC"
        )


def require_at_least_one(**counts: int) -> None:
    """Raises ValueError for the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
