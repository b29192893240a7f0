"""Sequential Monte Carlo: particles that carry weights and are resampled when the weights degenerate.

Target: p(x) exp(r(x) / alpha), exactly as the number of particles grows, for any value.
Source: Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, 2023, arXiv 2306.17775.
FK-steering and tempering: see `svdd.samplers.toolbox.weights`.
"""

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one, require_noise
from svdd.samplers.toolbox.selection import probabilities
from svdd.samplers.toolbox.temperature import Alpha
from svdd.samplers.toolbox.weights import Ends, Potential, Resampler, Tempering, Weighing, Weights
from svdd.samplers.toolbox.window import Window

__all__ = ["SMC"]


class SMC(Sampler):
    """Sequential Monte Carlo (FK-steering): N weighted particles per image, resampled when their weights degenerate.

    1. at each step move every particle by the pretrained kernel
    2. at guided steps w <- w G(v_i), with potentials G that multiply to exp(r / alpha) at the end of the chain; with
       alpha auto, at those from a third of the chain on, and alpha is half the standard deviation of the first v_i
    3. if the effective sample size of an image's weights is at most ess_threshold N: resample its particles
    4. at the end return the best, one drawn by weight, or all

    Costs N T denoiser rows per image.

    Args:
        num_particles: N, particles of an image.
        alpha: Temperature in units of the reward, above 0, or `auto`: half of the standard deviation of the values of
            the image's own particles at the first guided step from a third of the chain on; none is weighed before.
        potential: `difference` (of a particle's and its parent's value), `max` or `sum` (over its path), `immediate`.
        resampler: `multinomial`, `stratified`, `systematic`, `residual` or `ssp`.
        ess_threshold: Resample at an effective sample size of at most this share of N; 0 means never, 1 always.
        tempering: How the reward's weight rises: `none`, `linear`, `exponential`, or `adaptive` (by sample size).
        returns: `best` by reward, one `drawn` by weight, or `all` with their weights.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain; the final weights include the reward in any case.
        guide_every: Weigh at every k-th step.
    """

    budget_argument = "num_particles"
    compares_calls = True

    def __init__(
        self,
        num_particles: int = 8,
        alpha: Alpha = "auto",
        potential: Potential = "difference",
        resampler: Resampler = "ssp",
        ess_threshold: float = 0.5,
        tempering: Tempering = "none",
        returns: Ends = "best",
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_at_least_one(num_particles=num_particles)
        self.num_particles, self.window = num_particles, Window(guide_start, guide_stop, guide_every)
        self.weighing = Weighing(alpha, potential, resampler, ess_threshold, tempering, returns)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if copies of a particle would stay identical, or the value leaves rows out."""
        super().check(diffusion, value)
        require_noise(diffusion, "num_particles", self.num_particles if self.weighing.ess_threshold else 1)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the ends that `returns` selects for each image."""
        state = start(self.num_particles)
        weights = Weights.equal(state.num_images, self.num_particles, state.x.device)
        while not state.done:
            guided = self.window.guides(state.i, state.num_steps)
            state = state.propose()
            progress = state.i / state.num_steps
            guided = guided and self.weighing.weighs(progress)
            if self.num_particles == 1 or not (guided or state.done):
                continue
            v = self.evaluate(value, state)
            before, weights = weights.log_normaliser, self.weighing.weigh(weights, v, progress)
            log_w, increment = weights.log_w, weights.log_normaliser - before
            if state.done:
                index = self.weighing.ends(weights, v, state.uniforms)
            else:
                index, weights = self.weighing.resample(weights, state.uniforms(self.num_particles))
            state = self.keep(state, index, v, log_w, increment, alpha=weights.alpha)
        if len(state.x) > state.num_images:
            state.context.trace.weights = probabilities(weights.log_w)
        return state
