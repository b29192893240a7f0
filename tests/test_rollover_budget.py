"""Rollover budget forcing: the law of the number of draws, what rolls over, and its limits."""

import math

import pytest
import torch

from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.svdd import SVDD
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, bound, run
from tests.test_samplers import assert_mean

B = [0.6, -0.8] * 8


class Drifting(PosteriorMean):
    """The posterior mean's reward plus drift i: candidates of a step keep their order, and all rise or fall."""

    def __init__(self, drift: float) -> None:
        super().__init__()
        self.drift = drift

    def estimate(self, state):
        return super().estimate(state) + self.drift * state.i


def candidates(final) -> list[list[int]]:
    return [trace["candidates"] for trace in final.context.trace.per_image()]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_without_improvement_it_is_svdd(batch_size):
    """With 16 numbers in a latent, noise drawn in parts is the noise drawn at once."""
    diffusion, value = GaussianDiffusion(5, size=16), bound(Drifting(-1e3), Linear(B))
    final, expected = (run(diffusion, sampler, value, 3) for sampler in (RolloverBudget(7, batch_size), SVDD(7)))
    assert torch.equal(final.x, expected.x)
    assert candidates(final) == [[7] * 5] * 3
    assert final.context.trace.path_kl.tolist() == pytest.approx(expected.context.trace.path_kl.tolist())


def test_a_batch_of_all_candidates_is_svdd():
    value = bound(PosteriorMean(), Linear(B))
    final, expected = (run(GaussianDiffusion(5, size=16), s, value, 3) for s in (RolloverBudget(6, 9), SVDD(6)))
    assert torch.equal(final.x, expected.x)


def test_what_an_improvement_saves_is_spent_at_the_last_step_that_costs_rows():
    value = bound(Drifting(1e3), Linear(B))
    final = run(GaussianDiffusion(6, size=16), RolloverBudget(7, 3), value, 2)
    assert candidates(final) == [[3, 3, 3, 3, 7 + 4 * (7 - 3), 7]] * 2
    quotas = [7, 11, 15, 19, 23, 7]
    assert final.context.trace.path_kl.tolist() == pytest.approx([sum(math.log(n) - (n - 1) / n for n in quotas)] * 2)
    silent = run(GaussianDiffusion(6, size=16, last=1.0), RolloverBudget(7, 3), value, 2)  # no noise in the last step
    assert candidates(silent) == [[3, 3, 3, 3, 23]] * 2


@pytest.mark.parametrize("drift", [0.0, 0.1, -0.3])
def test_the_number_of_draws_is_a_truncated_geometric_one(drift):
    """E[x0 | x_i] is a martingale of this chain, so a candidate's value is normal around its parent's plus the drift.

    A draw exceeds the start's value with probability p. The number drawn is min(G, M) with G geometric, and the kept
    candidate exceeds it unless all M draws fail.
    """
    diffusion, b, m = GaussianDiffusion(3), [0.6, -0.8], 4
    final = run(diffusion, RolloverBudget(m, 1), bound(Drifting(drift), Linear(b)), 2000)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slope = float(diffusion.posterior_mean(x, diffusion.signal[1], 0).diff())
    spread = slope * diffusion.std(0)
    p = 0.5 * math.erfc(-drift / spread / math.sqrt(2))
    first = final.context.trace.selections[0]
    drawn = first.values.isfinite().sum(1)
    for number in range(1, m + 1):
        expected = (1 - p) ** (number - 1) * (p if number < m else 1)
        assert_mean((drawn == number).double(), expected)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    starts = torch.stack([torch.randn(2, generator=each, dtype=torch.float64) for each in generators])
    value = diffusion.posterior_mean(starts, diffusion.signal[0], 0) @ torch.tensor(b, dtype=torch.float64)
    assert_mean((first.values.gather(1, first.kept)[:, 0] > value).double(), 1 - (1 - p) ** m)
    assert all(sum(counts) == 3 * m for counts in candidates(final))
