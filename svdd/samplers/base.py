"""The base class of all samplers, the types in its signatures, and checks that several samplers share."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdd import UserError, check_bound, missing_methods, require_at_least, require_numbers
from svdd.diffusion.base import Diffusion
from svdd.samplers.toolbox.selection import choice_kl, effective_sample_size, top
from svdd.samplers.toolbox.window import Window
from svdd.state.start import Start
from svdd.state.state import State
from svdd.state.trace import Selection, count_distinct
from svdd.values.base import Value

__all__ = [
    "Diffusion",
    "Sampler",
    "Start",
    "State",
    "Value",
    "require_at_least_one",
    "require_gaussian_steps",
    "require_noise",
    "require_shares",
    "require_single_scores",
    "require_window",
]

_MAX_COUNT = 10**6  # of particles, candidates or iterations


class Sampler(ABC):
    """Moves particles from noise to the end of the chain; a value decides which of them survive.

    A subclass implements `sample`; `svdd.samplers.budget` counts its cost. Constructors raise ValueError for arguments
    out of range.
    """

    budget_argument: ClassVar[str | None] = None  # the constructor argument, a count, that a budget may choose
    needs_gradient: bool = False  # whether `sample` differentiates the value
    compares_calls: bool = False  # whether rewards of several evaluations are compared, or are weights of a law
    num_kept: int | None = None  # most rows of an image that a selection keeps; None: `sample` needs every row's value
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Sampler":
        """Keeps the constructor's arguments, so that a budget can change the count among them."""
        if missing := missing_methods(cls):
            raise UserError(missing)
        sampler = super().__new__(cls)
        sampler.arguments = args, kwargs
        return sampler

    def __repr__(self) -> str:
        """Returns the call that makes the sampler, without arguments that have their defaults."""
        signature, (positional, named) = inspect.signature(type(self).__init__), self.arguments
        given = [*signature.bind(self, *positional, **named).arguments.items()][1:]
        changed = [f"{name}={value!r}" for name, value in given if value != signature.parameters[name].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def sample(self, start: Start, value: Value) -> State:
        """Takes `start(n)`, n rows per image at i = 0, to the end of the chain; returns equally many rows per image."""

    def __call__(self, start: Start, value: Value) -> State:
        """Runs `sample`; raises UserError unless it returns the end of the chain, with equally many rows per image."""
        start.context.preview = value.preview
        final, images = self.sample(start, value), len(start.context.generators)
        if not isinstance(final, State):
            wrong = f"a {type(final).__name__}; it must return the State at the end of the chain"
        elif not final.done:
            wrong = f"a state at step {final.i} of {final.num_steps}; it must go on until state.done is true"
        elif not len(final.x) or len(final.x) % images:
            wrong = f"{len(final.x)} rows for {images} images; it must return equally many, at least one, per image"
        else:
            return final
        raise UserError(f"{type(self).__name__}.sample returned {wrong}")

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the sampler cannot work on this chain or with this value."""
        if self.needs_gradient and not value.differentiable:
            raise UserError(
                f"{type(self).__name__} needs gradients, and {value.describe()} is not differentiable; use a "
                "differentiable reward such as CLIPScore, or a sampler that needs none, such as SVDD or SMC"
            )
        if self.compares_calls:
            require_single_scores(self, value)
        own, given = type(self).__name__, type(value).__name__
        if value.keep is not None and self.num_kept is None:
            raise UserError(
                f"{own} needs the value of every row, and {given} leaves rows out; use another value, or a sampler "
                "that only compares them: SVDD, BeamSearch or BlockwiseBestOfN"
            )
        if value.keep is not None and self.num_kept is not None and value.keep < self.num_kept:
            raise UserError(
                f"{own} keeps {self.num_kept} rows of an image, and {given} scores only keep={value.keep}; set keep to "
                f"{self.num_kept} or more"
            )

    @staticmethod
    def finish(state: State) -> State:
        """Samples plainly to the end of the chain, one child per row; nothing is kept for previews on the way."""
        state = replace(state, context=replace(state.context, preview=None))
        while not state.done:
            state = state.propose()
        return state

    @staticmethod
    def evaluate(value: Value, state: State) -> Tensor:
        """Returns the values of a state's rows, [images, rows per image]."""
        values = value(state).view(state.num_images, -1)
        state.context.report(state.i, values)
        return values

    @staticmethod
    def keep(
        state: State,
        index: Tensor,
        values: Tensor,
        log_w: Tensor | None = None,
        log_normaliser: Tensor | None = None,
        kl: Tensor | float | None = None,
        alpha: Tensor | float | None = None,
    ) -> State:
        """Selects rows of every image, as `State.select` does, and records the selection in the trace.

        Args:
            state: The candidate rows.
            index: The rows to keep, int64 [images, k].
            values: The values that decided, [images, rows]; -inf where a row has none.
            log_w: Log-weights, if any, [images, rows]; the trace records their effective sample size.
            log_normaliser: Increment of the estimate of log Z, if any, [images].
            kl: Bound on the divergence that the selection adds, if known, in nats, [images].
            alpha: The temperature of the weights, if there is one, a number or [images, 1].
        """
        kept = state.select(index, kl)
        ancestors = count_distinct(kept.origin.view(state.num_images, -1))
        ess = None if log_w is None else effective_sample_size(log_w)
        known = values.masked_fill(values.isneginf(), math.nan)
        temperatures = (
            None
            if alpha is None or log_w is None
            else torch.as_tensor(alpha, dtype=torch.float64).flatten().expand(len(index))
        )
        without = values.isneginf().sum(1)
        found = Selection(state.i, known, index, ancestors, ess, log_normaliser, temperatures, state.done, without)
        state.context.trace.selections.append(found)
        return kept

    def keep_best(self, ends: State, value: Value) -> State:
        """Selects each image's row of the highest reward among independent ends of the chain."""
        if len(ends.x) == ends.num_images:
            return ends
        v = self.evaluate(value, ends)
        return self.keep(ends, top(v), v, kl=choice_kl(v, alpha=0))


def require_noise(
    diffusion: Diffusion,
    name: str,
    count: int,
    window: Window | None = None,
    guides: Callable[[int, int], bool] | None = None,
) -> None:
    """Raises UserError if a count above 1 would only make copies, because no step (of the window) draws noise.

    Or if no step with noise is one where `guides(i, T)` is true, the steps where a schedule has several candidates.
    """
    if count > 1 and not diffusion.stochastic:
        raise UserError(
            f"{name}={count} needs a chain with noise: with eta=0 every step is deterministic, with rho=1 too, "
            f"and the last step of many schedulers always is: all {count} candidates of a particle are the same image; "
            "set eta above 0 (1.0 as in the paper) and more than one step, or use BestOfN"
        )
    if count > 1 and window is not None:
        noisy, steps = require_window(diffusion, window), diffusion.num_inference_steps
        if guides is not None and not any(guides(i, steps) for i in noisy):
            raise UserError(
                f"no step would be guided: {name} is 1, which leaves no choice, at all steps with noise that "
                f"guide_start={window.start}, guide_stop={window.stop} and guide_every={window.every} include, "
                f"{noisy[0]} to {noisy[-1]} of 0 to {steps - 1}; set it above 1 at one of them, or widen the window"
            )


def require_single_scores(sampler: Sampler, value: Value) -> None:
    """Raises UserError for a groupwise reward, whose scores in different evaluations are not comparable."""
    if any(getattr(reward, "groupwise", False) for reward in value._bound):
        raise UserError(
            f"{type(sampler).__name__} with these settings compares images that were scored at different times, or "
            f"weighs by exp(r / alpha), and {value.reward.name} scores an image relative to those scored with it; use "
            "BestOfN, BeamSearch, BlockwiseBestOfN, RandomSearch, ProgressivePruning, or SVDD with one particle or "
            "alpha = 0"
        )


def require_window(diffusion: Diffusion, window: Window) -> list[int]:
    """Returns the steps of the window that draw noise; UserError if there is none."""
    steps = diffusion.num_inference_steps
    if not (noisy := [i for i in range(steps) if window.guides(i, steps) and diffusion.std(i) > 0]):
        raise UserError(
            f"no step would be guided: guide_start={window.start}, guide_stop={window.stop} and guide_every="
            f"{window.every} leave no step with noise at num_inference_steps={steps} (with eta=0 there is none; set "
            "eta above 0; the last step of ddpm and euler_ancestral has none: widen the window)"
        )
    return noisy


def require_gaussian_steps(diffusion: Diffusion, sampler: Sampler) -> None:
    """Raises UserError if a step is a GLASS transition, whose density is unknown."""
    if diffusion.inner_steps > 1:
        raise UserError(
            f"{type(sampler).__name__} shifts the mean of Gaussian steps, and steps with inner_steps="
            f"{diffusion.inner_steps} are not Gaussian; set inner_steps to 1, or use a sampler such as SVDD or SMC"
        )


def require_at_least_one(**counts: int) -> None:
    """Raises ValueError for the first count that is no integer, below 1, or far above what memory holds."""
    for name, count in counts.items():
        require_at_least(1, **{name: count})
        check_bound(name, count, _MAX_COUNT, "each is a row of the network")


def require_shares(**shares: float) -> None:
    """Raises ValueError for the first share that does not lie above 0 and at most at 1."""
    require_numbers(**shares)
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie above 0 and be at most 1, got {share}")
