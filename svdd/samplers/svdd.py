"""Soft value-based decoding: at every step draw candidates and keep those of high value.

Law, with the exact soft value as M grows, at alpha > 0:
- one particle: the integral of p(x_T) p(x_0 | x_T) exp(r / alpha) / E[exp(r / alpha) | x_T], whose start is not tilted;
- one particle with choose_start, or b particles as b grows: p(x_0) exp(r / alpha) / Z, the pretrained model tilted.

Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding, 2024, arXiv 2408.08252, Algorithm 1.
"""

import torch
from torch import Tensor

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one, require_noise
from svdd.samplers.toolbox.schedule import Counts, Schedule, expand
from svdd.samplers.toolbox.selection import choice_kl, draw, tempered, top
from svdd.samplers.toolbox.temperature import Alpha, require_alpha, temperature
from svdd.samplers.toolbox.window import Window

__all__ = ["SVDD"]


class SVDD(Sampler):
    """Soft value-based decoding: M candidates per step, one kept in proportion to exp(value / alpha).

    0. with choose_start: draw b M starts, and keep b in proportion to exp(v / alpha), or the b best at alpha = 0
    1. at each guided step, for each of the b particles: draw M candidates x_{i+1} from the pretrained kernel
    2. v = value(candidates)
    3. of each image's b M candidates, draw b in proportion to exp((v - v of the parent) / alpha), or take the b best at
       alpha = 0; at the last step, where the value is the reward of the image itself, keep one

    Steps 1 to 3 at b = 1 are Algorithm 1 of the paper. Additions: b > 1 (sequential Monte Carlo with multinomial
    resampling at every step, or at alpha = 0 a beam search), choose_start, score_parent and the window. Costs
    b (1 + M (T - 1)) denoiser rows per image with a posterior-mean value, b M T with choose_start; b T with a learned
    value.

    Args:
        num_candidates: M, children of a particle at every guided step (`duplicate_size` in the paper's code). Or where
            a stretch of the chain ends, as a fraction of it, and its M, as in {0.3: 4, 1.0: 32}; or a list of T counts.
        alpha: Temperature in units of the reward; 0 takes the best; `auto`, at every selection, is half of the
            standard deviation of the values that compete.
        num_particles: b, particles kept per image; more than one makes a beam search.
        score_parent: Score candidates by the x0 of their parent, which is already known: b T denoiser rows for any M.
            Needs num_particles > 1, and at alpha = 0 num_candidates < num_particles.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide every k-th step; at the others one candidate is drawn.
        choose_start: Also choose among M starts per particle; needed for the law p exp(r / alpha) at b = 1.
    """

    budget_argument = "num_candidates"

    def __init__(
        self,
        num_candidates: Counts = 20,
        alpha: Alpha = 0.0,
        num_particles: int = 1,
        score_parent: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
        choose_start: bool = False,
    ) -> None:
        require_at_least_one(num_particles=num_particles)
        self.window = Window(guide_start, guide_stop, guide_every)
        self._schedule = Schedule(num_candidates, self.window)
        require_alpha(alpha, zero=True)
        if score_parent and num_particles == 1:
            raise ValueError("score_parent needs num_particles > 1: candidates of one particle would score the same")
        if score_parent and alpha == 0 and self._schedule.most >= num_particles:
            raise ValueError(
                "score_parent needs num_candidates < num_particles at alpha = 0: those of the best particle would fill "
                f"every place; got {num_candidates} and {num_particles}"
            )
        self.num_candidates, self.alpha, self.num_particles = num_candidates, alpha, num_particles
        self.score_parent, self.choose_start, self.num_kept = score_parent, choose_start, num_particles
        self.compares_calls = num_particles > 1 and alpha != 0  # a candidate's value and its parent's

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if all candidates would be the same, or the value scores too few of them."""
        super().check(diffusion, value)
        expand(self.num_candidates, diffusion.num_inference_steps)
        if not self.choose_start:
            require_noise(diffusion, "num_candidates", self._schedule.most, self.window, self._schedule.guides)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the selected end of the chain for each image."""
        state = start(self.num_particles * (self._schedule.first if self.choose_start else 1))
        log_potentials = torch.zeros(state.num_images, self.num_particles, dtype=torch.float64, device=state.x.device)
        if len(state.x) > self.num_particles * state.num_images:
            state, log_potentials = self._select(state, self.evaluate(value, state), log_potentials)
        while not state.done:
            m = self._schedule(state.i, state.num_steps) if state.std > 0 else 1
            parents, state = state, state.propose(m)
            by_parent = self.score_parent and not state.done
            if len(state.x) == (1 if state.done else self.num_particles) * state.num_images:
                continue  # nothing to select from
            v = self.evaluate(value, parents).repeat_interleave(m, 1) if by_parent else self.evaluate(value, state)
            state, log_potentials = self._select(state, v, log_potentials)
        return state

    def _select(self, state: State, v: Tensor, log_potentials: Tensor) -> tuple[State, Tensor]:
        """Keeps b rows per image, at the end of the chain one; v is [images, rows], the potentials [images, b]."""
        kept = 1 if state.done else self.num_particles
        alpha = temperature(self.alpha, v)
        kl = choice_kl(v, alpha) if self.num_particles == 1 else None
        if self.alpha == 0:
            return self.keep(state, top(v, kept), v, kl=kl), log_potentials
        scaled = tempered(v, alpha)
        log_w = scaled - log_potentials.repeat_interleave(v.shape[1] // self.num_particles, 1)
        index = draw(log_w, state.uniforms(kept))
        return self.keep(state, index, v, log_w, kl=kl, alpha=alpha), scaled.gather(1, index)
