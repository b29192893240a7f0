"""Progressive pruning: start with many chains, drop the worst of them on the way, keep the best end.

Target: the image of the highest reward among many starts.
Source: Guimaraes and Perona, PSP: Inference-Time Scaling of Diffusion Models via Progressive Seed Pruning (paper and
code: github.com/rogerioagjr/PSP). Su et al., Navigating the Exploration-Exploitation Tradeoff in Inference-Time Scaling
of Diffusion Models, 2025, arXiv 2508.12361, reduce the particles of SMC likewise (a funnel), with resampling.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from svdd.samplers.base import Sampler, Start, State, Value, require_at_least_one
from svdd.samplers.toolbox.selection import top

__all__ = ["ProgressivePruning"]


class ProgressivePruning(Sampler):
    """Progressive pruning (PSP): 2N chains, N after a quarter of the steps, N / 2 after half, the best end of these.

    1. start the number of chains in the schedule's first entry
    2. at each further entry (fraction, survivors): keep the survivors of the highest value
    3. return the end of the highest reward

    The default schedule is that of PSP; other schedules, and values other than the reward of the posterior mean, are
    additions. Costs about N T denoiser rows per image: at each step the chains before pruning, after it with a learned
    value.

    Args:
        num_particles: N; the default schedule costs about as much as N whole chains.
        schedule: Pairs (fraction of the chain, survivors as a multiple of N, rounded down, at least 1); fractions rise
            from 0 to below 1, survivors do not rise.
    """

    budget_argument = "num_particles"

    def __init__(
        self, num_particles: int = 8, schedule: Sequence[tuple[float, float]] = ((0.0, 2.0), (0.25, 1.0), (0.5, 0.5))
    ) -> None:
        require_at_least_one(num_particles=num_particles)
        fractions, survivors = [fraction for fraction, _ in schedule], [survivors for _, survivors in schedule]
        if fractions[:1] != [0] or not all(a < b for a, b in pairwise([*fractions, 1])):
            raise ValueError(f"schedule: fractions must rise from 0 to below 1, got {fractions}")
        if not all(a >= b > 0 for a, b in pairwise([math.inf, *survivors])):
            raise ValueError(f"schedule: survivors must be positive and must not rise, got {survivors}")
        self.num_particles, self.schedule = num_particles, schedule

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of the surviving chains for each image."""
        state = start(self._survivors(0, 1))
        while not state.done:
            survivors = self._survivors(state.i, state.num_steps)
            if survivors * state.num_images < len(state.x):
                v = self.evaluate(value, state)
                state = self.keep(state, top(v, survivors), v)
            state = state.propose()
        if len(state.x) == state.num_images:
            return state
        v = self.evaluate(value, state)
        return self.keep(state, top(v), v)

    def _survivors(self, i: int, steps: int) -> int:
        """Returns the number of chains that continue from step i; pruning begins at step 1."""
        last = steps - 1  # in a short chain a late fraction is rounded down to the last step
        multiples = [s for part, s in self.schedule if i >= min(round(part * steps), last) and (i or not part)]
        return max(1, int(multiples[-1] * self.num_particles))
