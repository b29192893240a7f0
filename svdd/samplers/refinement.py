"""Reward-guided refinement: noise a finished image in part, guide it to the end again, keep the better image.

Target: the image of the highest reward; at alpha > 0 the law p exp(r / alpha), see below.
Source: Uehara et al., Reward-Guided Iterative Refinement in Diffusion Models at Test-Time with Applications to Protein
and DNA Design, 2025, arXiv 2502.14944. Starting edits at a noise level inside the chain: Meng et al., SDEdit, 2021,
arXiv 2108.01073. Acceptance: Barker, Monte Carlo Calculations of the Radial Distribution Functions, 1965.
"""

import torch

from svdd import UserError
from svdd.samplers.base import (
    Diffusion,
    Sampler,
    Start,
    State,
    Value,
    require_at_least_one,
    require_shares,
    require_single_scores,
)
from svdd.samplers.svdd import SVDD
from svdd.samplers.toolbox.selection import draw, top
from svdd.samplers.toolbox.temperature import require_alpha
from svdd.state.recorder import descent

__all__ = ["Refinement"]


class Refinement(Sampler):
    """Reward-guided refinement: rounds of partial noising and guided denoising; the better image is kept.

    1. run the sampler from the start to the end of the chain: the image x_0
    2. `rounds` times: draw x_i = alpha_i x_0 + sigma_i noise, where i = T - round(strength T), and run the sampler from
       there to the end: x_0'; then x_0 <- the better of x_0 and x_0', or at alpha > 0 one of them in proportion to
       exp(r / alpha)
    3. return x_0

    As published: a guided pass, then noising and guided denoising in turn, with SVDD as the guide. The paper resamples
    its designs among each other after each round and has no acceptance; here an image competes with its own
    predecessor only, so images are independent, and at alpha = 0 its reward never falls. Other samplers in place of
    SVDD are an addition. At alpha > 0 with `Unguided`, the rounds are a Markov chain of Barker's acceptance whose
    stationary law is p exp(r / alpha), as far as a noised image that is denoised again has the law p.

    Costs as much as the sampler on T steps, and `rounds` times as much as on T - i steps: with SVDD
    1 + M (T - 1) + rounds (1 + M (T - i - 1)) denoiser rows per image.

    Args:
        rounds: How often the image is noised and denoised again.
        strength: Share of the chain that a round repeats, above 0, at most 1; 1 keeps next to nothing of the image.
        alpha: Temperature of the acceptance, in units of the reward; 0 keeps the better image.
        sampler: The sampler of the first pass and of the rounds, with one image per start, by default SVDD with 4
            candidates.
    """

    budget_argument = "rounds"

    def __init__(
        self, rounds: int = 4, strength: float = 0.5, alpha: float = 0.0, sampler: Sampler | None = None
    ) -> None:
        require_at_least_one(rounds=rounds)
        require_shares(strength=strength)
        require_alpha(alpha, zero=True, auto=False)
        self.rounds, self.strength, self.alpha = rounds, strength, alpha
        self.sampler = SVDD(num_candidates=4) if sampler is None else sampler
        self.needs_gradient = self.sampler.needs_gradient

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the sampler cannot work on this chain, or the chain cannot noise an image."""
        self.sampler.check(diffusion, value)
        require_single_scores(self, value)
        if type(diffusion).renoise is Diffusion.renoise:
            raise UserError(f"Refinement noises finished images, and {type(diffusion).__name__} has no `renoise`")

    def sample(self, start: Start, value: Value) -> State:
        """Returns the refined end of the chain for each image."""
        best = self.sampler(start, value)
        if len(best.x) > best.num_images:
            raise UserError(
                f"Refinement refines one image per start, and {type(self.sampler).__name__} returned "
                f"{len(best.x) // best.num_images}; let it return the best"
            )
        best_value = self.evaluate(value, best)
        for _ in range(self.rounds):
            ends = self.sampler(_Restart(best, self.strength), value)
            v = torch.cat([best_value, self.evaluate(value, ends)], 1)
            log_w = v.double() / self.alpha if self.alpha else None
            index = top(v) if log_w is None else draw(log_w, ends.uniforms(1))
            best, best_value = self.keep(best.join(ends), index, v, log_w, alpha=self.alpha), v.gather(1, index)
        return best


class _Restart(Start):
    """Begins inside the chain: `start(n)` draws n noised copies of each finished image."""

    def __init__(self, ends: State, strength: float) -> None:
        self.ends, self.context = ends, ends.context
        self.i = ends.num_steps - max(1, round(strength * ends.num_steps))

    def __call__(self, n: int = 1) -> State:
        """Draws n >= 1 rows per image at step i."""
        ends, context = self.ends, self.context
        context.trace.diverge(None)  # noised images of another law than the pretrained one
        x, row, origin = (known.repeat_interleave(n, 0) for known in (ends.x, ends.row, ends.origin))
        x = context.diffusion.renoise(x, context.noise(n).to(x), self.i)
        return State(x, self.i, row, origin, context, descent(ends, n))
