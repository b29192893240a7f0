"""Soft value-based decoding: at every step draw candidates and keep those of high value.

Target: p(x) exp(r(x) / alpha), the pretrained model tilted by the reward.
Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding, 2024, arXiv 2408.08252, Algorithm 1.
"""

import torch

from svdd.diffusion.base import Diffusion
from svdd.samplers.base import Sampler, require_at_least_one, require_guided_step, require_noise
from svdd.samplers.toolbox.selection import choice_kl, draw, top
from svdd.samplers.toolbox.window import Window
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["SVDD"]


class SVDD(Sampler):
    """Soft value-based decoding: M candidates per step, one kept in proportion to exp(value / alpha).

    1. for each guided step, for each of the b particles: draw M candidates x_{i+1} from the pretrained kernel
    2. v = value(candidates)
    3. keep b of each image's b M candidates in proportion to exp((v - v of the parent) / alpha), at alpha = 0 the b
       best; at the last step, where the value is the reward of the image itself, keep one

    With one particle the parent's value is the same for all, and what is left is exp(v / alpha). With several it makes
    up for the choice that the parent has won already, so that the target stays that of one.

    Costs b (1 + M (T - 1)) denoiser rows per image with a posterior-mean value, b T with a learned one.

    Args:
        num_candidates: M, children of a particle at every guided step (`duplicate_size` in the paper's code).
        alpha: Temperature in units of the reward; 0 takes the best.
        num_particles: b, particles kept per image; more than one makes a beam search.
        weigh_current: Score candidates by the x0 of the particle that they come from, which is known, instead of
            their own: b T denoiser rows whatever M is. Needs num_particles > 1, and at alpha = 0 num_candidates below
            it: all candidates of a particle score the same, and those of the best would take every place.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide at every so many steps; one candidate is drawn at the others.

    Raises:
        ValueError: If an argument is out of range.
    """

    budget_argument = "num_candidates"

    def __init__(
        self,
        num_candidates: int = 20,
        alpha: float = 0.0,
        num_particles: int = 1,
        weigh_current: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_at_least_one(num_candidates=num_candidates, num_particles=num_particles)
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if weigh_current and num_particles == 1:
            raise ValueError("weigh_current needs num_particles > 1: candidates of one particle would score the same")
        if weigh_current and alpha == 0 and num_candidates >= num_particles:
            raise ValueError(
                f"weigh_current needs num_candidates < num_particles at alpha = 0, got {num_candidates} and "
                f"{num_particles}: the candidates of the best particle would take every place"
            )
        self.num_candidates, self.alpha, self.num_particles = num_candidates, alpha, num_particles
        self.weigh_current, self.start_particles = weigh_current, num_particles
        self.guide_start, self.guide_stop, self.guide_every = guide_start, guide_stop, guide_every
        self.tells_path_kl = num_particles == 1
        self.window = Window(guide_start, guide_stop, guide_every)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if candidates would all be the same."""
        require_noise(diffusion, "num_candidates", self.num_candidates)
        if self.num_candidates > 1:
            require_guided_step(diffusion, self.window)

    def sample(self, state: State, value: Value) -> State:
        """Returns the chosen end of the chain for each image."""
        steps = state.context.diffusion.num_inference_steps
        paid = torch.zeros(state.num_images, self.num_particles, dtype=torch.float64, device=state.x.device)
        while not state.done:
            guided = state.std > 0 and self.window.guides(state.i, steps)
            m = self.num_candidates if guided else 1
            candidates = state.propose(m)
            kept = 1 if candidates.done else self.num_particles
            if len(candidates.x) == kept * candidates.num_images:  # nothing to choose from
                state = candidates
                continue
            if self.weigh_current and not candidates.done:
                v = self.evaluate(value, state).repeat_interleave(m, 1)
            else:
                v = self.evaluate(value, candidates)
            if self.tells_path_kl:
                state.context.trace.path_kl += choice_kl(v, self.alpha)
            if self.alpha == 0:
                state = self.keep(candidates, top(v, kept), v)
                continue
            scaled = v.double() / self.alpha
            log_w = scaled - paid.repeat_interleave(m, 1)
            index = draw(log_w, candidates.uniforms(kept))
            state, paid = self.keep(candidates, index, v, log_w), scaled.gather(1, index)
        return state

    def rows(self, num_inference_steps: int) -> int:
        """B (1 + M (T - 1)) where every step is guided; a step that is not counts 1 instead of M."""
        if self.weigh_current:
            return self.rows_of_free_value(num_inference_steps)
        guided = sum(self.window.guides(i, num_inference_steps) for i in range(num_inference_steps - 1))
        return self.num_particles * (num_inference_steps + (self.num_candidates - 1) * guided)

    def rows_of_free_value(self, num_inference_steps: int) -> int:
        """B T."""
        return self.num_particles * num_inference_steps
