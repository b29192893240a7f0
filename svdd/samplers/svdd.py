"""Soft value-based decoding: at every step draw candidates and keep those of high value.

Target: p(x) exp(r(x) / alpha), the pretrained model tilted by the reward.
Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
Decoding, 2024, arXiv 2408.08252, Algorithm 1.
"""

import torch

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one, require_noise
from svdd.samplers.toolbox.selection import choice_kl, draw, top
from svdd.samplers.toolbox.window import Window

__all__ = ["SVDD"]


class SVDD(Sampler):
    """Soft value-based decoding: M candidates per step, one kept in proportion to exp(value / alpha).

    1. at each guided step, for each of the b particles: draw M candidates x_{i+1} from the pretrained kernel
    2. v = value(candidates)
    3. of each image's b M candidates, draw b in proportion to exp((v - v of the parent) / alpha), or take the b best at
       alpha = 0; at the last step, where the value is the reward of the image itself, keep one

    Costs b (1 + M (T - 1)) denoiser rows per image with a posterior-mean value, b T with a learned one.

    Args:
        num_candidates: M, children of a particle at every guided step (`duplicate_size` in the paper's code).
        alpha: Temperature in units of the reward; 0 takes the best.
        num_particles: b, particles kept per image; more than one makes a beam search.
        score_parent: Score candidates by the x0 of their parent, which is already known: b T denoiser rows for any M.
            Needs num_particles > 1, and at alpha = 0 num_candidates < num_particles.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide every k-th step; at the others one candidate is drawn.
    """

    budget_argument = "num_candidates"

    def __init__(
        self,
        num_candidates: int = 20,
        alpha: float = 0.0,
        num_particles: int = 1,
        score_parent: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_at_least_one(num_candidates=num_candidates, num_particles=num_particles)
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if score_parent and num_particles == 1:
            raise ValueError("score_parent needs num_particles > 1: candidates of one particle would score the same")
        if score_parent and alpha == 0 and num_candidates >= num_particles:
            raise ValueError(
                "score_parent needs num_candidates < num_particles at alpha = 0: those of the best particle would fill "
                f"every place; got {num_candidates} and {num_particles}"
            )
        self.num_candidates, self.alpha, self.num_particles = num_candidates, alpha, num_particles
        self.score_parent, self.window = score_parent, Window(guide_start, guide_stop, guide_every)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if all candidates would be the same."""
        require_noise(diffusion, "num_candidates", self.num_candidates, self.window)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the selected end of the chain for each image."""
        state = start(self.num_particles)
        log_potentials = torch.zeros(state.num_images, self.num_particles, dtype=torch.float64, device=state.x.device)
        while not state.done:
            m = self.num_candidates if state.std > 0 and self.window.guides(state.i, state.num_steps) else 1
            parents, state = state, state.propose(m)
            kept = 1 if state.done else self.num_particles
            if len(state.x) == kept * state.num_images:  # nothing to select from
                continue
            by_parent = self.score_parent and not state.done
            v = self.evaluate(value, parents).repeat_interleave(m, 1) if by_parent else self.evaluate(value, state)
            kl = choice_kl(v, self.alpha) if self.num_particles == 1 else None
            if self.alpha == 0:
                state = self.keep(state, top(v, kept), v, kl=kl)
                continue
            scaled = v.double() / self.alpha
            log_w = scaled - log_potentials.repeat_interleave(m, 1)
            index = draw(log_w, state.uniforms(kept))
            state, log_potentials = self.keep(state, index, v, log_w, kl=kl), scaled.gather(1, index)
        return state
