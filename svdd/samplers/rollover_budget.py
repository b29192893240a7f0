"""Rollover budget forcing: a step ends with the first improvement, and later steps spend what it saved.

Target: the image of the highest reward.
Source: Kim et al., Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, 2025,
arXiv 2503.19385 (RBF), and its code: github.com/KAIST-Visual-AI-Group/Flow-Inference-Time-Scaling.
"""

import math

import torch
from torch import Tensor

from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one, require_noise
from svdd.samplers.toolbox.ragged import proposals, stack
from svdd.samplers.toolbox.selection import choice_kl, top
from svdd.state.trace import Selection

__all__ = ["RolloverBudget"]


class RolloverBudget(Sampler):
    """Rollover budget forcing (RBF): draw candidates until one exceeds the best value so far; later steps get the rest.

    1. start from the best of num_starts; r* = its value; quota = 0
    2. at each step: quota <- quota + M; draw candidates, batch_size at once, until one has a value above r* or the
       quota is used up; quota <- quota - the number drawn
    3. continue with the candidate of the highest value v; r* <- max(r*, v)
    4. the last step whose candidates cost network rows uses up its quota; the step to the image draws M

    Published with candidates one by one and with 25 starts in the authors' code. Additions: batch_size, and the M
    candidates of the step to the image, which the network does not evaluate. With batch_size >= M this is `SVDD` at
    alpha = 0. Costs num_starts + M (T - 1) denoiser rows per image with a posterior-mean value, T with a learned value.

    Args:
        num_candidates: M, added to the quota at every step.
        batch_size: Candidates drawn at once.
        num_starts: Starts, of which the best is kept.
    """

    budget_argument = "num_candidates"
    compares_calls = True

    def __init__(self, num_candidates: int = 20, batch_size: int = 4, num_starts: int = 1) -> None:
        require_at_least_one(num_candidates=num_candidates, batch_size=batch_size, num_starts=num_starts)
        self.num_candidates, self.batch_size, self.num_starts = num_candidates, batch_size, num_starts

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if all candidates would be the same, or the value leaves rows out."""
        super().check(diffusion, value)
        require_noise(diffusion, "num_candidates", self.num_candidates)

    def sample(self, start: Start, value: Value) -> State:
        """Returns the end of the search for each image."""
        state, m = start(self.num_starts), self.num_candidates
        if m == self.num_starts == 1:
            return self.finish(state)
        v = self.evaluate(value, state)
        if self.num_starts > 1:
            state = self.keep(state, top(v), v, kl=choice_kl(v, alpha=0))
        best, quota = v.amax(1).double(), torch.zeros(len(v), dtype=torch.int64, device=v.device)
        last = max((i for i in range(state.num_steps - 1) if start.context.diffusion.std(i) > 0), default=0)
        while not state.done:
            if m == 1 or state.std == 0:
                state = state.propose()
                continue
            quota = quota + m
            state, v, drawn = self._search(state, value, best if state.i < last else best + math.inf, quota)
            best, quota = best.maximum(v), quota - drawn
        return state

    def _search(self, parents: State, value: Value, target: Tensor, quota: Tensor) -> tuple[State, Tensor, Tensor]:
        """Draws children until one exceeds the target; returns the best, its value and the number drawn, [images]."""
        best: list[State] = []  # one row per image, once children are drawn
        values, drawn = target.new_full((len(quota), int(quota.max())), -math.inf), torch.zeros_like(quota)
        column = torch.arange(max(values.shape), device=quota.device)
        while (counts := (quota - drawn).clamp(max=self.batch_size) * (values.amax(1) <= target)).any():
            parts, place = best, column[: len(quota)]  # where each image's best child is among the rows of the parts
            for images, children in proposals(parents, counts):
                v = self.evaluate(value, children).double()
                m, before = v.shape[1], sum(len(part.x) for part in parts)
                better = v.amax(1) > values[images].amax(1)
                found = before + m * column[: len(images)] + top(v)[:, 0]
                place = place.index_put((images[better],), found[better])
                values[images[:, None], drawn[images, None] + column[:m]] = v
                parts = [*parts, children]
            best, drawn = [stack(parts, parents.context).select(place[None], kl=0.0)], drawn + counts
        values, trace, n = values[:, : int(drawn.max())], parents.context.trace, quota.double()
        known, done = values.masked_fill(values.isneginf(), math.nan), best[0].done
        trace.selections.append(Selection(parents.i + 1, known, top(values), torch.ones_like(drawn), among_ends=done))
        trace.diverge(n.log() - (n - 1) / n)  # that of the best of n, which an early stop does not exceed
        return best[0], values.amax(1), drawn
