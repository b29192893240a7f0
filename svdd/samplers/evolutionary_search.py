"""Evolutionary search over the initial noise: selection of the best starts, and mutation that preserves their law.

Target: the start whose chain ends in the highest reward.
Sources: He et al., Scaling Image and Video Generation via Test-Time Evolutionary Search, 2025, arXiv 2505.17618
(EvoSearch); Spectral Evolution Search, 2026, arXiv 2602.03208 (low frequencies of the start).
"""

import torch
from torch import Tensor

from svdd.samplers.base import State, require_shares
from svdd.samplers.start_search import StartSearch, blend
from svdd.samplers.toolbox.frequencies import low_pass

__all__ = ["EvolutionarySearch"]


class EvolutionarySearch(StartSearch):
    """Evolutionary search over the initial noise: random starts first, then mutants of the best so far.

    1. draw F starts and run each to its end, all with the same noise in the steps; keep the E best: the elites
    2. K times: draw N children sqrt(1 - radius^2) elite + radius noise, of the elites in turn, and run each to its end;
       the E best of elites and children are the next elites; if the best one stays, radius <- decay radius
    3. return the end of the best start

    Elites, and mutations that preserve the normal law of a start, are EvoSearch's. It draws parents by tournaments over
    90 % of the population, mutates at the constant rate 0.2, has few large generations, and also mutates the states of
    later steps. Here are small generations of mutants of the elites, a radius that shrinks, a choice of frequencies,
    and starts only. Costs (F + K N) T denoiser rows per image.

    Args:
        num_generations: K, generations after the first.
        num_candidates: N, children in each of them.
        num_starts: F, independent starts in the first generation.
        num_elites: E, starts that survive a generation and have children.
        radius: Share of new noise in the first children, above 0, at most 1; 1 draws independent starts.
        decay: Factor on the radius after a generation that found nothing better, above 0, at most 1.
        frequencies: Share of the spatial frequencies of each axis that mutate, lowest first, above 0; 1 means all.
    """

    def __init__(
        self,
        num_generations: int = 6,
        num_candidates: int = 2,
        num_starts: int = 4,
        num_elites: int = 1,
        radius: float = 0.6,
        decay: float = 0.9,
        frequencies: float = 1.0,
    ) -> None:
        super().__init__(num_generations, num_candidates, num_starts, num_elites)
        require_shares(radius=radius, decay=decay, frequencies=frequencies)
        self.radius, self.decay, self.frequencies = radius, decay, frequencies

    def children(self, elites: Tensor, failures: Tensor, state: State) -> Tensor:
        """Returns mutants of the elites in turn."""
        n = self.num_candidates
        turn = torch.arange(n, device=elites.device) % elites.shape[1]
        parents = elites[:, turn]
        noise = state.context.diffusion.initial(state.context.perturbations(n).to(elites)).view_as(parents)
        mutants = blend(parents, noise, self.radius * self.decay**failures)
        return (parents + low_pass(mutants - parents, self.frequencies)).flatten(0, 1)
