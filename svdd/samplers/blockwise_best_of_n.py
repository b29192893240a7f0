"""Blockwise best-of-N: let candidates run for a block of steps before one is chosen.

Target: as SVDD's, with choices that are rarer and better informed.
Source: Singh et al., CoDe: Blockwise Control for Denoising Diffusion Models, 2025, arXiv 2502.00968.
"""

from svdd.diffusion.base import Diffusion
from svdd.samplers.base import Sampler, require_at_least_one, require_guided_step, require_noise
from svdd.samplers.toolbox.selection import choice_kl, choose
from svdd.samplers.toolbox.window import Window
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["BlockwiseBestOfN"]


class BlockwiseBestOfN(Sampler):
    """Blockwise best-of-N (CoDe): M candidates run for a block of steps, then one is kept.

    1. draw M candidates of the particle, and let each run on to the end of the block
    2. v = value(candidates)
    3. keep one in proportion to exp(v / alpha), at alpha = 0 the best; go on with the next block

    A block of one step is `SVDD`, a block of all steps is best-of-N from one start. Costs 1 + M (T - 1) denoiser rows
    per image, B + M (T - B) with `weigh_current`, where B is the number of blocks.

    Args:
        num_candidates: M, candidates of each block.
        block_size: Steps of a block; the first one is shorter where they do not divide the chain.
        alpha: Temperature in units of the reward; 0 takes the best.
        weigh_current: Score a candidate by its x0 one step before the end of the block, which is known by then, so
            that only the kept one is evaluated there. Needs block_size > 1.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.

    Raises:
        ValueError: If an argument is out of range.
    """

    budget_argument = "num_candidates"
    tells_path_kl = True

    def __init__(
        self,
        num_candidates: int = 8,
        block_size: int = 5,
        alpha: float = 0.0,
        weigh_current: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
    ) -> None:
        require_at_least_one(num_candidates=num_candidates, block_size=block_size)
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if weigh_current and block_size == 1:
            raise ValueError("weigh_current needs block_size > 1: candidates would score the same after one step")
        self.num_candidates, self.block_size, self.alpha = num_candidates, block_size, alpha
        self.weigh_current, self.guide_start, self.guide_stop = weigh_current, guide_start, guide_stop
        self._inside = Window(guide_start, guide_stop)
        self._ends = Window(guide_start, guide_stop, block_size)  # the last step of each block

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if candidates would all be the same."""
        require_noise(diffusion, "num_candidates", self.num_candidates)
        if self.num_candidates > 1:
            require_guided_step(diffusion, self._inside)

    def sample(self, state: State, value: Value) -> State:
        """Returns the chosen end of the chain for each image."""
        steps = state.context.diffusion.num_inference_steps
        while not state.done:
            parents = state
            alone = len(state.x) == state.num_images
            branches = alone and state.std > 0 and self._inside.guides(state.i, steps)
            state = state.propose(self.num_candidates if branches else 1)
            if not self._ends.guides(parents.i, steps) or len(state.x) == state.num_images:
                continue
            known = parents if self.weigh_current and not alone and not state.done else state
            v = self.evaluate(value, known)
            state.context.trace.path_kl += choice_kl(v, self.alpha)
            index = choose(v, self.alpha, 1, state.uniforms)
            state = self.keep(state, index, v, log_w=v.double() / self.alpha if self.alpha else None)
        return state

    def rows(self, num_inference_steps: int) -> int:
        """1 + M (T - 1) where every step is guided; a step that is not counts 1 instead of M."""
        guided = sum(self._counts_all(i, num_inference_steps) for i in range(num_inference_steps - 1))
        return num_inference_steps + (self.num_candidates - 1) * guided

    def rows_of_free_value(self, num_inference_steps: int) -> int:
        """B + M (T - B) for B blocks: where a block ends, only what is kept is evaluated."""
        inside = (
            self._inside.guides(i, num_inference_steps) and not self._ends.guides(i, num_inference_steps)
            for i in range(num_inference_steps - 1)
        )
        return num_inference_steps + (self.num_candidates - 1) * sum(inside)

    def _counts_all(self, i: int, steps: int) -> bool:
        """Whether all candidates of the step that leaves i are evaluated where they arrive."""
        last_of_block = self._ends.guides(i, steps)
        first_of_block = not self._inside.guides(i - 1, steps) or self._ends.guides(i - 1, steps)
        free = self.weigh_current and last_of_block and not first_of_block
        return self._inside.guides(i, steps) and not free
