"""Diffusion posterior sampling: every step is pulled along the gradient of the value.

Target: approximately p(x) exp(scale r(x)); `TwistedSMC` adds the weights that make it exact.
Source: Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2022, arXiv 2209.14687, with the
step size std_i^2 of a guided reverse kernel (Dhariwal and Nichol, 2021, arXiv 2105.05233) in place of a constant one.
"""

import math

import torch

from svdd import UserError, require_numbers
from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_gaussian_steps, require_window
from svdd.samplers.toolbox.window import Window

__all__ = ["DPS"]


class DPS(Sampler):
    """Diffusion posterior sampling: each step is shifted by scale std^2 times the gradient of the value.

    1. v = value(x_i) and its gradient with respect to x_i, for each row by itself
    2. x_{i+1} ~ N(mean_i(x_i) + scale std_i^2 grad v, std_i^2 I)

    The shift grows with the unit of the reward: for c r in place of r use scale / c. A scale far too large ruins the
    images. Needs a differentiable value. Costs T denoiser rows per image, and a backward pass for each guided one.

    Args:
        scale: Strength in units of 1 / reward, at least 0; 1 / alpha of other samplers; no default fits all rewards.
        through_denoiser: Differentiate through the network; else at x0, without a backward pass and less exact.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide every k-th step.
    """

    needs_gradient = True

    def __init__(
        self,
        scale: float = 10.0,
        through_denoiser: bool = True,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_numbers(scale=scale)
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be a finite number >= 0, got {scale}")
        self.scale, self.through_denoiser = scale, through_denoiser
        self.window = Window(guide_start, guide_stop, guide_every)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the value has no gradient, or guided steps are not Gaussian or have no noise."""
        super().check(diffusion, value)
        require_gaussian_steps(diffusion, self)
        require_window(diffusion, self.window)
        if not self.through_denoiser and value.most_rows == 0:
            raise UserError(
                f"DPS with through_denoiser=False needs a value of x0, and {value.describe()} reads x; set it to true"
            )

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the guided chain for each image."""
        state = start()
        first_row = torch.zeros(state.num_images, 1, dtype=torch.int64, device=state.x.device)
        while not state.done:
            if not (state.std > 0 and self.window.guides(state.i, state.num_steps)):
                state = state.propose()
                continue
            v, slope = state.gradient(value, self.through_denoiser)
            state.context.report(state.i, v)
            state = self.keep(state, first_row, v[:, None], kl=0.0)  # one row per image: for the trace alone
            kl = (self.scale * state.std) ** 2 / 2 * slope.flatten(1).double().square().sum(1)  # normal laws, equal std
            state = state.propose(mean=state.prediction.mean + self.scale * state.std**2 * slope, kl=kl)
        return state
