"""Beam search over the chain: the b best of b M candidates at every step.

Target: the image of the highest reward.
Source: textbook beam search, applied as `SVDD` at alpha = 0 with a beam of constant width. Li et al., Dynamic Search
for Inference-Time Alignment in Diffusion Models, 2025, arXiv 2503.02039 (DSearch) vary the width, the number of
children and the steps of the search along the chain and look ahead with several denoiser steps; none of that is done
here.
"""

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one
from svdd.samplers.svdd import SVDD
from svdd.samplers.toolbox.schedule import Counts

__all__ = ["BeamSearch"]


class BeamSearch(Sampler):
    """Beam search: M candidates of each of b beams per step, the b best of all of them kept.

    1. at each guided step: draw M candidates of each of the b beams, keep the b of the highest value
    2. return the beam of the highest reward

    This is `SVDD` at alpha = 0 with b particles. Costs b (1 + M (T - 1)) denoiser rows per image.

    Args:
        num_beams: b, beams kept per image.
        num_candidates: M, candidates of each beam at every guided step. Or where a stretch of the chain ends, as a
            fraction of it, and its M, as in {0.3: 4, 1.0: 32}; or a list of T counts.
        score_parent: Score candidates by the x0 of their beam: b T rows for any M. Needs num_candidates < num_beams.
        guide_start: Where guidance begins, as a fraction of the chain, 0 .. 1.
        guide_stop: Where it ends, as a fraction of the chain.
        guide_every: Guide every k-th step.
    """

    budget_argument = "num_candidates"

    def __init__(
        self,
        num_beams: int = 4,
        num_candidates: Counts = 4,
        score_parent: bool = False,
        guide_start: float = 0.0,
        guide_stop: float = 1.0,
        guide_every: int = 1,
    ) -> None:
        require_at_least_one(num_beams=num_beams)
        self.num_kept = num_beams
        self._search = SVDD(num_candidates, 0.0, num_beams, score_parent, guide_start, guide_stop, guide_every)

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if all candidates would be the same, or the value scores too few of them."""
        super().check(diffusion, value)
        self._search.check(diffusion, value)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of the beams for each image."""
        return self._search.sample(start, value)
