"""Progressive pruning: start with many chains, drop the worst of them on the way, keep the best end.

Target: the image of the highest reward among many starts.
Sources: PSP (the schedule); Su et al., Navigating the Exploration-Exploitation Tradeoff in Inference-Time Scaling of
Diffusion Models, 2025, arXiv 2508.12361 (a funnel of particles).
"""

from collections.abc import Sequence
from itertools import pairwise

from svdd.samplers.base import Sampler, require_at_least_one
from svdd.samplers.toolbox.selection import top
from svdd.state.state import Start, State
from svdd.values.base import Value

__all__ = ["ProgressivePruning"]


class ProgressivePruning(Sampler):
    """Progressive pruning (PSP): 2N chains, N after a quarter of the steps, N / 2 after half, the best end of these.

    1. start the number of chains in the schedule's first entry
    2. at each further entry (fraction, survivors): keep the survivors of the highest value
    3. return the end of the highest reward

    Costs the chains alive at each step before pruning (after it with a learned value): by default about N T denoiser
    rows per image.

    Args:
        num_particles: N; the default schedule costs about as much as N whole chains.
        schedule: Pairs (fraction of the chain, survivors as a multiple of N, rounded down, at least 1); fractions rise
            from 0 to below 1, survivors do not rise.

    Raises:
        ValueError: If an argument is out of range.
    """

    budget_argument = "num_particles"

    def __init__(
        self,
        num_particles: int = 8,
        schedule: Sequence[tuple[float, float]] = ((0.0, 2.0), (0.25, 1.0), (0.5, 0.5)),
    ) -> None:
        require_at_least_one(num_particles=num_particles)
        self.num_particles, self.schedule = num_particles, [(float(f), float(s)) for f, s in schedule]
        fractions, survivors = [f for f, _ in self.schedule], [s for _, s in self.schedule]
        rising = all(a < b for a, b in pairwise(fractions))
        falling = all(a >= b for a, b in pairwise(survivors))
        if not self.schedule or fractions[0] != 0 or fractions[-1] >= 1 or not rising:
            raise ValueError(f"schedule: fractions must rise from 0 to below 1, got {fractions}")
        if min(survivors) <= 0 or not falling:
            raise ValueError(f"schedule: survivors must be positive and must not rise, got {survivors}")

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of the surviving chains for each image."""
        state = start(self._count(self.schedule[0][1]))
        while not state.done:
            alive, survivors = len(state.x) // state.num_images, self._survivors(state.i, state.num_steps)
            if survivors < alive:
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
        return self._count(
            min(s for fraction, s in self.schedule if i >= min(round(fraction * steps), last) and (i or not fraction))
        )

    def _count(self, multiple: float) -> int:
        return max(1, int(multiple * self.num_particles))
