"""Twisted sequential Monte Carlo: particles move along the gradient of the value, and weights account for it.

Target: p(x) exp(r(x) / alpha), exactly as the number of particles grows.
Source: Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, 2023, arXiv 2306.17775
(TDS). Tempering (DAS): see `svdd.samplers.toolbox.weights`.
"""

from svdd import UserError
from svdd.diffusion.base import per_row
from svdd.samplers.base import (
    Diffusion,
    Sampler,
    Start,
    State,
    Value,
    require_at_least_one,
    require_gaussian_steps,
    require_window,
)
from svdd.samplers.toolbox.selection import probabilities
from svdd.samplers.toolbox.temperature import Alpha
from svdd.samplers.toolbox.weights import Ends, Resampler, Tempering, Weighing, Weights
from svdd.samplers.toolbox.window import Window

__all__ = ["TwistedSMC"]


class TwistedSMC(Sampler):
    """Twisted SMC (TDS, DAS): SMC whose particles are proposed along the gradient of the value.

    1. at each guided step: v_i = value(x_i) and its gradient; w <- w exp(lambda_i v_i / alpha) / (potentials so far)
    2. resample the images whose effective sample size is at most ess_threshold N
    3. x_{i+1} ~ q = N(mean + std^2 lambda_i grad v / alpha, std^2 I), and w <- w p(x_{i+1} | x_i) / q(x_{i+1} | x_i)
    4. at the end w <- w exp(r / alpha) / (potentials so far); return the best, one drawn by weight, or all

    With alpha auto, steps before a third of the chain are not guided, and alpha is then half the standard deviation of
    the first v_i. Needs a differentiable value. Costs N T denoiser rows per image, and a backward pass for each at
    guided steps.

    Args:
        num_particles: N, particles of an image.
        alpha: Temperature in units of the reward, above 0, or `auto`: half of the standard deviation of the values of
            the image's own particles at the first guided step from a third of the chain on; none is guided before.
        resampler: `multinomial`, `stratified`, `systematic`, `residual` or `ssp`.
        ess_threshold: Resample at an effective sample size of at most this share of N; 0 means never, 1 always.
        tempering: How the reward's weight rises: `none`, `linear`, `exponential`, or `adaptive` (by sample size).
        returns: `best` by reward, one `drawn` by weight, or `all` with their weights.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain; the final weights include the reward in any case.
        guide_every: Guide every k-th step.
    """

    needs_gradient = True
    budget_argument = "num_particles"

    def __init__(
        self,
        num_particles: int = 4,
        alpha: Alpha = "auto",
        resampler: Resampler = "ssp",
        ess_threshold: float = 0.5,
        tempering: Tempering = "exponential",
        returns: Ends = "best",
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_at_least_one(num_particles=num_particles)
        self.num_particles, self.window = num_particles, Window(guide_start, guide_stop, guide_every)
        self.weighing = Weighing(alpha, "difference", resampler, ess_threshold, tempering, returns)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the value has no gradient, or guided steps are not Gaussian or have no noise."""
        super().check(diffusion, value)
        require_gaussian_steps(diffusion, self)
        require_window(diffusion, self.window)
        if self.num_particles == 1 and self.weighing.alpha == "auto":
            raise UserError(
                "alpha: auto is measured among particles, and num_particles=1 is one; set alpha to a number"
            )
        steps, std = diffusion.num_inference_steps, diffusion.std
        if not any(self._guides(i, steps) and std(i) > 0 for i in range(steps)):
            raise UserError(
                f"alpha: auto guides from a third of the chain on, and guide_stop={self.window.stop} at "
                f"num_inference_steps={steps} leaves no such step with noise; set alpha to a number"
            )

    def sample(self, start: Start, value: Value) -> State:
        """Returns the ends that `returns` selects for each image."""
        state = start(self.num_particles)
        weights = Weights.equal(state.num_images, self.num_particles, state.x.device)
        log_z, n = weights.log_normaliser, self.num_particles
        while not state.done:
            progress = state.i / state.num_steps
            if not self._guides(state.i, state.num_steps):
                state = state.propose()
                continue
            v = state.gradient(value)[0].view(state.num_images, -1)
            state.context.report(state.i, v)
            weights = self.weighing.weigh(weights, v, progress)
            increment, log_z, log_w = weights.log_normaliser - log_z, weights.log_normaliser, weights.log_w
            index, weights = self.weighing.resample(weights, state.uniforms(n))
            state = self.keep(state, index, v, log_w, increment, alpha=weights.alpha)
            variance, mean, slope = state.std**2, state.prediction.mean, state.gradient(value)[1]
            strength = (weights.exponent / weights.alpha).repeat_interleave(n, 0)
            shift = variance * per_row(strength, slope).to(slope) * slope
            state = state.propose(mean=mean + shift)
            if variance > 0:
                # log p / q = (|x - mean - shift|^2 - |x - mean|^2) / (2 std^2), without the difference of large numbers
                drift, whole = shift.double().flatten(1), (state.x - mean).double().flatten(1)
                log_ratio = (drift * (drift / 2 - whole)).sum(1).view(state.num_images, n) / variance
                weights = weights._replace(log_w=weights.log_w + log_ratio)
        rewards = self.evaluate(value, state)
        weights = self.weighing.weigh(weights, rewards, 1.0)
        index = self.weighing.ends(weights, rewards, state.uniforms)
        state = self.keep(state, index, rewards, weights.log_w, weights.log_normaliser - log_z, alpha=weights.alpha)
        if self.weighing.returns == "all":
            state.context.trace.weights = probabilities(weights.log_w)
        return state

    def _guides(self, i: int, steps: int) -> bool:
        return self.window.guides(i, steps) and self.weighing.weighs(i / steps)
