"""What the searches over starts by generations share: the loop that runs starts to their ends and keeps the best."""

from abc import abstractmethod

import torch
from torch import Tensor

from svdd.diffusion.base import per_row
from svdd.samplers.base import Sampler, Start, State, Value, require_at_least_one
from svdd.samplers.toolbox.selection import top

__all__ = ["StartSearch", "blend"]


class StartSearch(Sampler):
    """Runs `num_starts` starts, then `num_generations` times `num_candidates` new ones; the best of all survive.

    All chains of an image receive the same noise in the steps, so an end depends on its start alone.
    """

    budget_argument = "num_generations"
    compares_calls = True
    num_kept = 1  # all selections are among ends, which every value scores

    def __init__(self, num_generations: int, num_candidates: int, num_starts: int, num_elites: int) -> None:
        require_at_least_one(
            num_generations=num_generations,
            num_candidates=num_candidates,
            num_starts=num_starts,
            num_elites=num_elites,
        )
        self.num_generations, self.num_candidates = num_generations, num_candidates
        self.num_starts, self.num_elites = num_starts, num_elites

    @abstractmethod
    def children(self, elites: Tensor, failures: Tensor, state: State) -> Tensor:
        """Returns the next generation's starts, [images * num_candidates, *latent_shape].

        Args:
            elites: The best starts so far, best first, [images, at most num_elites, *latent_shape].
            failures: The generations so far in which no child was better than the best start, [images].
            state: The first starts; their context draws random numbers.
        """

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the best start found for each image."""
        state = start(self.num_starts)
        images = state.num_images
        best = self.finish(state.replay(state.x))
        starts, v = state.x.unflatten(0, (images, -1)), self.evaluate(value, best)
        best, starts, v, _ = self._select(best, starts, v)
        failures = torch.zeros(images, device=starts.device)
        for _ in range(self.num_generations):
            new = self.children(starts, failures, state)
            ends = self.finish(state.replay(new))
            starts = torch.cat([starts, new.unflatten(0, (images, -1))], 1)
            v = torch.cat([v, self.evaluate(value, ends)], 1)
            best, starts, v, same = self._select(best.join(ends), starts, v)
            failures = failures + same
        return best if v.shape[1] == 1 else self.keep(best, top(v), v)

    def _select(self, ends: State, starts: Tensor, v: Tensor) -> tuple[State, Tensor, Tensor, Tensor]:
        """Keeps each image's best rows of `ends`, with their starts and values; also tells whether the first stays."""
        index = top(v, min(self.num_elites, v.shape[1]))
        images = torch.arange(len(index), device=index.device)[:, None]
        return self.keep(ends, index, v), starts[images, index], v.gather(1, index), index[:, 0] == 0


def blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Returns sqrt(1 - share^2) x + share other, one share per row: standard normal if both are, and independent."""
    share = per_row(share, x).to(torch.promote_types(x.dtype, torch.float32))  # half precision would change the spread
    return ((1 - share**2).sqrt() * x + share * other).to(x.dtype)
