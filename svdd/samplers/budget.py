"""The cost of an image, counted by running the sampler on a chain of one number, and the counts that fit a budget."""

import inspect
import math
import pickle
import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.preview import Preview
from svdd.samplers.base import Sampler
from svdd.samplers.toolbox.schedule import expand, scaled
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.screened import Screened

__all__ = ["Cost", "Uncountable", "count", "current_count", "fit_budget", "settings"]

# Rows of an image at once from which a CPU gains nothing by more: benchmarks/reproducible.md
_TOGETHER, _TOGETHER_UNDECODED = 6.5, 12


class Cost(NamedTuple):
    """The cost of one returned image: exact, or an upper bound if the value takes several denoiser rows per row."""

    returned: int  # rows that the sampler returns per image of the batch; the other entries are those of `Ledger`
    denoiser_rows: float
    network_rows: float  # here in units of a whole denoiser row; a preview counts by its share of one
    gradient_rows: float
    decoded_images: float
    reward_calls: float
    together: float  # rows of an image that go through the network together, averaged over rows

    @property
    def rows(self) -> float:
        """The unit of a budget: whole denoiser rows, where a backward pass counts as two more, a preview as a part."""
        return self.network_rows + 2 * self.gradient_rows

    @property
    def fills_a_cpu(self) -> bool:
        """Whether a CPU gains nothing from rows of several images in one call."""
        often = 2 * self.decoded_images >= self.denoiser_rows  # small calls of the decoder are the cheaper ones
        return self.together >= (_TOGETHER if often else _TOGETHER_UNDECODED)


class Uncountable(UserError):
    """A sampler failed on the chain of one number; it may still work on the real one."""


class _Exceeded(UserError):
    """The count passed its limit."""


def count(sampler: Sampler, diffusion: Diffusion, value: Value, limit: float = math.inf) -> Cost:
    """Runs the sampler for one image on a chain of one number, with noise in the same steps as `diffusion`.

    Raises:
        UserError: If it takes more than `limit` denoiser rows, draws from a global generator or returns a wrong state.
        Uncountable: If it fails otherwise.
    """
    method, before = f"{type(sampler).__name__}.sample", _global_generators()
    with torch.inference_mode(False), torch.no_grad():
        try:
            chain = _OneNumber(diffusion, limit)
            final = sampler(Start(chain, [""], [0]), _counted(value))
        except UserError:
            raise
        except Exception as error:
            raise Uncountable(
                f"{method} failed on the chain of one number that counts costs, with {type(error).__name__}: {error}"
            ) from error
    if before != _global_generators():
        raise UserError(
            f"{method} draws from a global random generator, so that an image would depend on others; draw noise with "
            "state.propose and uniform numbers with state.uniforms"
        )
    spent = final.context.ledger.per_image(len(final.x))
    work = {name: spent[name] for name in Cost._fields[1:-1]}
    return Cost(len(final.x), **work, together=chain.squares / max(chain.rows, 1))


def current_count(sampler: Sampler) -> dict[str, Any]:
    """Returns {name: number, or schedule} of the argument that a budget may choose; {} if there is none."""
    name = sampler.budget_argument
    return {} if name is None else {name: _arguments(sampler, name).arguments[name]}


def settings(sampler: Sampler) -> dict[str, Any]:
    """Returns a sampler's constructor arguments as plain values; a sampler among them as its class and arguments."""
    found: dict[str, Any] = {}
    for name, given in _arguments(sampler).arguments.items():
        if isinstance(given, Sampler):
            found[name] = {"class": type(given).__name__, "arguments": settings(given)}
        elif isinstance(given, float) and not math.isfinite(given):
            found[name] = str(given)
        else:
            plain = given is None or isinstance(given, bool | int | float | str | list | tuple | dict)
            found[name] = given if plain else type(given).__name__
    return found


def fit_budget(sampler: Sampler, budget: int, diffusion: Diffusion, value: Value, limit: float = math.inf) -> Sampler:
    """Returns the same sampler with the largest count whose cost, as `Cost.rows`, does not exceed the budget.

    Where the count is a schedule, its counts are scaled, each at least 1.

    Raises:
        UserError: If even a count of 1 exceeds the budget, or the count does not change the cost; without a message if
            a count of 1 takes more than `limit` denoiser rows.
    """
    name, kind = sampler.budget_argument, type(sampler).__name__
    if name is None:
        raise UserError(f"budget={budget}: {kind} has no count that a budget could choose; leave the budget out")
    bound, cannot = _arguments(sampler, name), f"budget={budget} cannot choose {kind}'s {name}:"
    given, steps = bound.arguments[name], diffusion.num_inference_steps

    def build(number: int) -> Sampler:
        bound.arguments[name] = scaled(given, number, steps) if isinstance(given, list | dict) else number
        return type(sampler)(*bound.args, **bound.kwargs)

    least = count(build(1), diffusion, value, limit)
    if least.rows > budget:
        raise UserError(
            f"budget={budget} is too small: {kind} with {name}=1 costs {least.rows:g} denoiser rows per image"
            f"{' (a backward pass counts as 2 more)' if least.gradient_rows else ''} at num_inference_steps="
            f"{diffusion.num_inference_steps}; raise the budget or lower num_inference_steps"
        )

    def rows_of(number: int, limit: float = budget * least.returned) -> float:
        """Returns the cost with a count: infinity beyond the limit, NaN if the constructor refuses the count."""
        try:
            cost = count(build(number), diffusion, value, limit)
        except _Exceeded:
            return math.inf
        except UserError:
            raise
        except ValueError:
            return math.nan
        if cost.returned != least.returned:
            raise UserError(f"{cannot} every particle is returned, so the cost is the same; set it yourself")
        return cost.rows

    counts = expand(given, steps) if isinstance(given, list | dict) else [1]
    ceiling = max(8 * budget, min(8 * budget * sum(counts) // min(counts), 10**5))  # of a schedule, for all steps
    slope = rows_of(2, math.inf) - least.rows
    best = min(1 + int((budget - least.rows) / slope), ceiling) if slope > 0 else 1  # right if the cost is linear
    if not rows_of(best) <= budget < rows_of(best + 1):
        most = budget
        while most < ceiling and rows_of(most) <= budget:  # previews cost parts of rows, the last step none
            most *= 2
        best = 1 + bisect_left(range(2, most + 1), True, key=lambda number: not rows_of(number) <= budget)
    following = rows_of(best + 1)
    if following <= budget or not (slope > 0 or max(rows_of(best), following) > least.rows):
        raise UserError(
            f"{cannot} with {type(value).__name__} it does not change the cost of {rows_of(best):g} denoiser rows per "
            "image; set it yourself and leave the budget out"
        )
    return build(best)


class _OneNumber(Diffusion):
    """A chain of single numbers, with the length of another and noise in the same steps."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, diffusion: Diffusion, limit: float) -> None:
        super().__init__(diffusion.num_inference_steps)
        self.latent_shape, self.inner_steps = (1,) * len(diffusion.latent_shape), diffusion.inner_steps
        self.noisy = [float(diffusion.std(i) > 0) for i in range(diffusion.num_inference_steps)]
        self.limit, self.rows, self.squares, self.whole = limit, 0, 0, 0.0
        self._real = diffusion

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        pass

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def denoise(self, x: Tensor, i: int, conditioning: None, row: Tensor) -> Denoised:
        self._count(len(x))
        return Denoised(x / 2, x / 2)

    def draw(self, x: Tensor, x0: Tensor, noise: Tensor, i: int, conditioning: None, row: Tensor) -> Tensor:
        for _ in range(self.inner_steps - 1):
            self._count(len(x))
        return x0 + noise

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return x0 + noise

    def has_preview(self, preview: Preview, i: int) -> bool:
        return self._real.has_preview(preview, i)

    def preview_rows(self, preview: Preview, i: int) -> float:
        return self._real.preview_rows(preview, i) / self._real.network_rows(self._real.guidance_scale, i)

    def record(self, x: Tensor, i: int, conditioning: None, row: Tensor, preview: Preview) -> dict[str, Tensor]:
        return {**self.denoise(x, i, conditioning, row)._asdict(), "features": x}

    def preview(self, x: Tensor, i: int, *where: Any) -> Tensor:
        self._count(len(x), self.preview_rows(where[2], i))
        return x / 2

    def _count(self, rows: int, share: float = 1.0) -> None:
        self.rows, self.squares, self.whole = self.rows + rows, self.squares + rows**2, self.whole + rows * share
        if self.whole > self.limit:
            raise _Exceeded

    def std(self, i: int) -> float:
        return self.noisy[i]

    def decode(self, x0: Tensor) -> Tensor:
        return x0.reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)


def _counted(value: Value) -> Value:
    """Returns a value of the same cost on the chain of one number, bound to itself as its reward."""
    if not isinstance(value, Screened):
        return _Counted(value)
    return _CountedScreened(_Counted(value.cheap), _Counted(value.exact), value.keep, value.start)


class _CountedScreened(Screened):
    reward = property(lambda self: self.exact)


class _Counted(Value):
    """Takes as many denoiser rows per evaluated row as another value does at most; it is its own reward."""

    differentiable = True
    reward = property(lambda self: self)

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.most_rows, self.preview = value.most_rows, value.preview

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1) / 1000  # on this scale no population of particles degenerates

    def estimate(self, state: State) -> Tensor:
        if self.most_rows == 0:
            return self.score(state.x, state.prompts)
        more = (self.most_rows - 1) * len(state.x)
        state.context.ledger.denoiser_rows += more
        state.context.ledger.network_rows += more
        return state.scores(self, None if self.preview is None else state.preview(self.preview))


def _global_generators() -> bytes:
    """Returns the states of the global generators of torch, numpy and Python."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))


def _arguments(sampler: Sampler, name: str | None = None) -> inspect.BoundArguments:
    """Returns the arguments of the sampler's constructor, defaults included; `name` must be one of them."""
    (args, kwargs), kind = sampler.arguments, type(sampler).__name__
    bound = inspect.signature(type(sampler)).bind(*args, **kwargs)
    bound.apply_defaults()
    if name is not None and name not in bound.arguments:
        raise UserError(f"{kind}.budget_argument is {name!r}, which is no argument of {kind}'s constructor")
    return bound
