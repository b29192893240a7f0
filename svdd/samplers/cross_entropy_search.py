"""Cross-entropy search over the initial noise: a Gaussian fitted to the best starts draws the next ones.

Target: the start whose chain ends in the highest reward.
Sources: Rubinstein, The Cross-Entropy Method for Combinatorial and Continuous Optimization, 1999 (Methodology and
Computing in Applied Probability 1); Spectral Evolution Search, 2026, arXiv 2602.03208, and its implementation in
DiffSynth-Studio (low frequencies of the start).
"""

import torch
from torch import Tensor

from svdd import require_numbers
from svdd.samplers.base import State, require_shares
from svdd.samplers.start_search import StartSearch, blend
from svdd.samplers.toolbox.frequencies import from_frequencies, low_pass, to_frequencies

__all__ = ["CrossEntropySearch"]


class CrossEntropySearch(StartSearch):
    """Cross-entropy search over the low frequencies of the initial noise.

    1. draw F starts and run each to its end, all with the same noise in the steps; keep the E best: the elites
    2. K times: mean and standard deviation of each low-frequency coefficient over the elites; N times draw
       z = sqrt(1 - shrinkage) (mean + std noise) + sqrt(shrinkage) noise' for these, take the other coefficients of the
       best start, and run the result to its end; the E best of elites and new starts are the next elites
    3. return the end of the best start

    The low frequencies and a diagonal Gaussian fitted to the elites of all generations are those of Spectral Evolution
    Search, with 5 elites of generations of 10, in the lowest band of a wavelet transform; the high frequencies are
    those of one start throughout, and a chain of fewer steps evaluates candidates. Here are a cosine transform, small
    generations, the high frequencies of the best start so far, shrinkage towards the law of the start (without it two
    elites would end the search at once), and whole chains. Costs (F + K N) T denoiser rows per image.

    Args:
        num_generations: K, generations after the first.
        num_candidates: N, starts drawn in each of them.
        num_starts: F, independent starts in the first generation.
        num_elites: E, best starts to which the Gaussian is fitted.
        shrinkage: Share of the variance that is fresh noise, 0 to 1; 1 draws independent low frequencies.
        frequencies: Share of the spatial frequencies of each axis that is searched, lowest first, above 0; 1 means all.
    """

    def __init__(
        self,
        num_generations: int = 6,
        num_candidates: int = 2,
        num_starts: int = 4,
        num_elites: int = 2,
        shrinkage: float = 0.2,
        frequencies: float = 0.375,
    ) -> None:
        super().__init__(num_generations, num_candidates, num_starts, num_elites)
        require_numbers(shrinkage=shrinkage)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in 0 .. 1, got {shrinkage}")
        require_shares(frequencies=frequencies)
        self.shrinkage, self.frequencies = shrinkage, frequencies

    def children(self, elites: Tensor, failures: Tensor, state: State) -> Tensor:
        """Returns starts whose low frequencies are drawn from the Gaussian, the others those of the best elite."""
        n, context = self.num_candidates, state.context
        coefficients = torch.stack([to_frequencies(image) for image in elites])  # apart, as in `low_pass`
        spread = coefficients.std(1, keepdim=True, unbiased=False)
        noise = context.perturbations(n).to(coefficients).unflatten(0, (len(elites), n))
        drawn = coefficients.mean(1, keepdim=True) + spread * noise
        drawn = torch.stack([from_frequencies(image) for image in drawn]).to(elites)
        fresh = context.diffusion.initial(context.perturbations(n).to(elites)).view_as(drawn)
        best = elites[:, :1]
        share = torch.full_like(failures, self.shrinkage**0.5)
        return (best + low_pass(blend(drawn, fresh, share) - best, self.frequencies)).flatten(0, 1)
