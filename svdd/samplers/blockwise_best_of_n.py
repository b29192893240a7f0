"""Blockwise best-of-N: run candidates for a block of steps, then select one.

Law: as SVDD's with one particle, with rarer and better informed selections: the start is chosen with choose_start only.
Source: Singh et al., CoDe: Blockwise Control for Denoising Diffusion Models, 2025, arXiv 2502.00968.
"""

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one, require_noise
from svdd.samplers.toolbox.schedule import Counts, Schedule, expand
from svdd.samplers.toolbox.selection import choice_kl, draw, tempered, top
from svdd.samplers.toolbox.temperature import Alpha, require_alpha, temperature
from svdd.samplers.toolbox.window import Window

__all__ = ["BlockwiseBestOfN"]


class BlockwiseBestOfN(Sampler):
    """Blockwise best-of-N (CoDe): M candidates run for a block of steps, then one is kept.

    1. draw M candidates of the particle (with choose_start, first of all: M starts), run each to the end of the block
    2. v = value(candidates)
    3. keep one in proportion to exp(v / alpha), at alpha = 0 the best; go on with the next block

    At alpha = 0 and with the other defaults as published; alpha > 0, choose_start, score_parent and the window are
    additions, and the paper's conditioning on a reference image is left out. Costs 1 + M (T - 1) denoiser rows per
    image; B + M (T - B) for B blocks with `score_parent` or a learned value. choose_start adds M - 1.

    Args:
        num_candidates: M, candidates of each block. Or where a stretch of the chain ends, as a fraction of it, and the
            M of the blocks that begin in it, as in {0.3: 4, 1.0: 32}; or a list with the M of each of the T steps.
        block_size: Steps of a block; the first one is shorter where they do not divide the chain.
        alpha: Temperature in units of the reward; 0 takes the best; `auto`, at every selection, is half of the
            standard deviation of the values that compete.
        score_parent: Score a candidate by its known x0 one step before the end of the block. Needs block_size > 1.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        choose_start: Begin the first block with M starts; then one block of all steps is best-of-N.
    """

    budget_argument = "num_candidates"
    num_kept = 1

    def __init__(
        self,
        num_candidates: Counts = 8,
        block_size: int = 5,
        alpha: Alpha = 0.0,
        score_parent: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        choose_start: bool = False,
    ) -> None:
        require_at_least_one(block_size=block_size)
        require_alpha(alpha, zero=True)
        if score_parent and block_size == 1:
            raise ValueError("score_parent needs block_size > 1: candidates would score the same after one step")
        self.num_candidates, self.alpha, self.score_parent = num_candidates, alpha, score_parent
        self.choose_start = choose_start
        self._window = Window(guide_start, guide_stop)
        self._schedule = Schedule(num_candidates, self._window)
        self._ends = Window(guide_start, guide_stop, block_size)  # the last step of each block

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if all candidates would be the same."""
        super().check(diffusion, value)
        expand(self.num_candidates, diffusion.num_inference_steps)
        if not self.choose_start:
            require_noise(diffusion, "num_candidates", self._schedule.most, self._window, self._schedule.guides)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the selected end of the chain for each image."""
        state = start(self._schedule.first if self.choose_start else 1)
        while not state.done:
            parents, steps = state, state.num_steps
            alone = len(state.x) == state.num_images
            state = state.propose(self._schedule(state.i, steps) if alone and state.std > 0 else 1)
            if not (self._ends.guides(parents.i, steps) or state.done) or len(state.x) == state.num_images:
                continue
            v = self.evaluate(value, parents if self.score_parent and not alone and not state.done else state)
            alpha = temperature(self.alpha, v)
            log_w = tempered(v, alpha) if self.alpha else None
            index = top(v) if log_w is None else draw(log_w, state.uniforms(1))
            state = self.keep(state, index, v, log_w, kl=choice_kl(v, alpha), alpha=alpha)
        return state
