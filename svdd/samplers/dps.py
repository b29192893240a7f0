"""Diffusion posterior sampling: every step is pulled along the gradient of the value.

Target: about p(x) exp(scale r(x)), without the weights that would make it so; `TwistedSMC` has them.
Source: Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2022, arXiv 2209.14687, with the
step size of a guided reverse kernel, std_i^2, in place of a constant one (Dhariwal and Nichol, 2021, arXiv 2105.05233).
"""

import math

import torch

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.samplers.base import Sampler, require_gradient, require_guided_step
from svdd.samplers.toolbox.window import Window
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["DPS"]


class DPS(Sampler):
    """Diffusion posterior sampling: each step is shifted by scale std^2 times the gradient of the value.

    1. v = value(x_i) and its gradient with respect to x_i, for each row by itself
    2. x_{i+1} ~ N(mean_i(x_i) + scale std_i^2 grad v, std_i^2 I)

    Needs a differentiable value. Costs T denoiser rows per image, each with a backward pass (about two more).

    Args:
        scale: Strength, 1 / alpha in terms of the other samplers: in units of 1 / reward.
        through_denoiser: Differentiate through the network. Without, the gradient is taken at x0, which saves the
            backward pass through the network and is less exact.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide at every so many steps.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_gradient = True
    tells_path_kl = True

    def __init__(
        self,
        scale: float = 10.0,
        through_denoiser: bool = True,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be a finite number >= 0, got {scale}")
        self.scale, self.through_denoiser = scale, through_denoiser
        self.guide_start, self.guide_stop, self.guide_every = guide_start, guide_stop, guide_every
        self.window = Window(guide_start, guide_stop, guide_every)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the value has no gradient or no step has room for one."""
        require_gradient(self, value)
        if not diffusion.stochastic:
            raise UserError("DPS shifts each step by its variance, and with eta=0 there is none; set eta above 0")
        require_guided_step(diffusion, self.window)
        if not self.through_denoiser and value.most_rows == 0:
            raise UserError(
                f"DPS with through_denoiser=False needs a value of x0, and {value.describe()} reads x; set "
                "through_denoiser to true: no network lies between x and this value"
            )

    def sample(self, state: State, value: Value) -> State:
        """Returns the end of the guided chain for each image."""
        steps = state.context.diffusion.num_inference_steps
        while not state.done:
            if state.std > 0 and self.window.guides(state.i, steps):
                v, slope = state.gradient(value, self.through_denoiser)
                state.context.report(state.i, float(v.mean()))
                strength = (self.scale * state.std) ** 2 / 2  # the divergence of two kernels of one std
                state.context.trace.path_kl += strength * slope.flatten(1).double().square().sum(1)
                nobody = torch.zeros(state.num_images, 1, dtype=torch.int64, device=v.device)  # there is one row each
                state = self.keep(state, nobody, v[:, None])
                state = state.propose(mean=state.prediction.mean + self.scale * state.std**2 * slope)
            else:
                state = state.propose()
        return state

    def rows(self, num_inference_steps: int) -> int:
        """T."""
        return num_inference_steps
