"""Samplers against closed-form laws, against each other in their limits, and against their exact costs."""

import math
from functools import cache
from typing import get_type_hints

import numpy as np
import pytest
import torch

import svdd.samplers
from svdd import UserError
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import count
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.dps import DPS
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.toolbox.schedule import Counts
from svdd.samplers.toolbox.temperature import Alpha
from svdd.samplers.toolbox.window import Window
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.lookahead import Lookahead
from svdd.values.losses import SoftLoss
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened
from tests.analytic import (
    ExactSoftValue,
    GaussianDiffusion,
    GridSoftValue,
    Linear,
    MixtureDiffusion,
    bound,
    run,
)

B = [0.6, -0.8]  # a unit vector
SAMPLERS = [
    Unguided(),
    BestOfN(1),
    BestOfN(4),
    SVDD(1),
    SVDD(5),
    SVDD(5, alpha=0.7),
    SVDD(3, num_particles=2),
    SVDD(3, alpha=0.7, num_particles=2),
    SVDD(1, num_particles=3),
    SVDD(4, guide_start=0.3, guide_stop=0.9),
    SVDD(4, num_particles=2, guide_every=2),
    SVDD(3, num_particles=4, score_parent=True),
    SVDD(3, choose_start=True),
    SVDD(3, alpha=0.7, num_particles=2, guide_start=0.3, choose_start=True),
    BeamSearch(3, 2),
    BlockwiseBestOfN(3, 2),
    BlockwiseBestOfN(3, 2, alpha=0.7, guide_start=0.3, choose_start=True),
    BlockwiseBestOfN(3, 2, alpha=0.7, score_parent=True),
    BlockwiseBestOfN(3, 2, guide_start=0.3, guide_stop=0.9),
    SMC(5, alpha=0.7),
    SMC(5, alpha=0.7, ess_threshold=1.0, resampler="multinomial", returns="drawn", guide_every=2),
    SMC(3, alpha=0.7, ess_threshold=1.0, potential="max", tempering="linear", returns="all"),
    SMC(4, alpha=0.7, tempering="adaptive", resampler="systematic"),
    ProgressivePruning(4),
    RandomSearch(4),
    ZeroOrderSearch(2, 3),
    EvolutionarySearch(2, 3),
    EvolutionarySearch(2, 3, num_elites=2, frequencies=0.5),
    CrossEntropySearch(2, 3),
    Refinement(2),
    Refinement(2, 0.4, 0.7, SVDD(3, 0.7, 2)),
    Refinement(1, 1.0, sampler=BestOfN(3)),
    NoiseOptimisation(3),
    RolloverBudget(3, 1),
    RolloverBudget(5, 3, num_starts=2),
    DPS(0.5),
    DPS(0.5, through_denoiser=False, guide_stop=0.6),
    TwistedSMC(4, alpha=0.7),
    TwistedSMC(3, alpha=0.7, tempering="adaptive", resampler="residual", returns="all", guide_every=2),
    SMC(5),
    SMC(3, tempering="adaptive", returns="all"),
    TwistedSMC(4),
    SVDD(5, alpha="auto"),
    SVDD(3, alpha="auto", num_particles=2, choose_start=True),
    BlockwiseBestOfN(3, 2, alpha="auto"),
]


def label(sampler) -> str:
    positional, named = sampler.arguments

    def word(each) -> str:
        return label(each) if isinstance(each, Sampler) else str(each)

    words = [*map(word, positional), *(f"{name}={word(each)}" for name, each in named.items())]
    return "-".join([type(sampler).__name__, *words])


def value_of(b=B):
    return bound(PosteriorMean(), Linear(b))


def rewards(state, b=B) -> torch.Tensor:
    return state.x.flatten(1) @ torch.tensor(b, dtype=torch.float64)


def assert_mean(samples: torch.Tensor, mean: float, slack: float = 0.0) -> None:
    """Asserts that the mean is within four standard errors plus `slack`, the bound on a known bias."""
    assert abs(float(samples.mean()) - mean) < 4 * float(samples.std()) / math.sqrt(len(samples)) + slack


def assert_variance(samples: torch.Tensor, variance: float, slack: float = 0.0) -> None:
    """As `assert_mean`, for the variance of normal samples, whose standard error is variance sqrt(2 / n)."""
    assert abs(float(samples.var()) / variance - 1) < 4 * math.sqrt(2 / len(samples)) + slack


@cache
def largest_of(m: int) -> float:
    """Returns the expected maximum of m standard normal numbers."""
    x = np.linspace(-9, 9, 20001)
    below = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in x])
    return float(np.sum(x * m * below ** (m - 1) * np.exp(-(x**2) / 2)) / math.sqrt(2 * math.pi) * (x[1] - x[0]))


# ---- formulas used by the tests


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_gaussian_chain_is_the_expected_linear_map(eta):
    diffusion = GaussianDiffusion(5, eta=eta)
    x = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first_row = torch.zeros(4, dtype=torch.int64)
    for i in range(5):
        factor, constant = diffusion.affine(i)
        mean = diffusion.denoise(x, i, torch.zeros(1, dtype=torch.float64), first_row).mean
        torch.testing.assert_close(mean, factor * x + constant)


def test_the_exact_soft_value_is_a_martingale_of_the_kernel():
    """exp(v_i(x) / alpha) = E[exp(v_{i+1} / alpha) | x_i = x], here by quadrature."""
    alpha, diffusion = 0.7, GaussianDiffusion(4, size=1)
    value = bound(ExactSoftValue(alpha), Linear([1.3]))
    state = State.start(diffusion, [""], [0]).propose()
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    mass = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    children = state.propose(4001)
    object.__setattr__(children, "x", state.prediction.mean + state.std * z.view(-1, 1, 1, 1))
    right = float((mass * torch.exp(value(children) / alpha)).sum())
    assert float(torch.exp(value(state) / alpha)) == pytest.approx(right, rel=1e-9)


def test_a_fine_chain_ends_in_its_prior():
    mean, variance = GaussianDiffusion(1000, first=1e-4, last=1 - 1e-5).end_law()
    assert mean == pytest.approx(0.3, abs=0.01)
    assert variance == pytest.approx(0.8**2, rel=0.02)


# ---- laws


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_unguided_ends_in_the_chains_law(steps, eta):
    diffusion = GaussianDiffusion(steps, eta=eta)
    entries = run(diffusion, Unguided(), value_of(), 1500).x.flatten()
    mean, variance = diffusion.end_law()
    assert_mean(entries, mean)
    assert_variance(entries, variance)


@pytest.mark.parametrize(
    "sampler", [Unguided(), SVDD(4, alpha=math.inf), SVDD(4, alpha=1e9), SVDD(2, math.inf, 2)], ids=label
)
def test_a_mixture_keeps_its_weights(sampler):
    """At infinite temperature samplers have the law of plain sampling, with other noise."""
    diffusion = MixtureDiffusion(6)
    x = run(diffusion, sampler, value_of([1.0]), 1000).x.flatten()
    law = diffusion.end_law()
    mean = float(law @ diffusion.grid)
    assert_mean(x, mean)
    assert_mean((x > 0.25).double(), float(law[diffusion.grid > 0.25].sum()))
    assert_mean((x - mean) ** 2, float(law @ (diffusion.grid - mean) ** 2))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_many_candidates_and_the_exact_soft_value_give_the_tilted_law(steps, alpha):
    """x_T | x_0 is N(A x_0 + c, V); tilting it by exp(b . x / alpha) shifts it by V b / alpha and keeps V.

    With M candidates the shift is too small by O(1 / M), which `slack` allows.
    """
    diffusion = GaussianDiffusion(steps)
    final = run(diffusion, SVDD(100, alpha), bound(ExactSoftValue(alpha), Linear(B)), 1000)
    mean, variance = diffusion.end_law()
    conditional = diffusion.end(0)[2]
    shift = conditional / alpha  # along the unit vector b
    assert_mean(rewards(final), mean * sum(B) + shift, slack=0.02 * shift)
    assert_variance(rewards(final), variance, slack=0.02)
    across = final.x.flatten(1) @ torch.tensor([0.8, 0.6], dtype=torch.float64)
    assert_mean(across, mean * 1.4)
    assert_variance(across, variance)


def test_a_tilted_mixture_moves_its_weights():
    diffusion, alpha = MixtureDiffusion(6), 1.0
    tilt = np.exp(diffusion.grid / alpha)
    value = bound(GridSoftValue(diffusion, tilt, alpha), Linear([1.0]))
    x = run(diffusion, SVDD(60, alpha), value, 700).x.flatten()
    law = diffusion.end_law(tilt)
    right = float(law[diffusion.grid > 0.25].sum())
    assert right > float(diffusion.end_law()[diffusion.grid > 0.25].sum()) + 0.2  # the tilt is not small
    assert_mean((x > 0.25).double(), right, slack=0.01)
    assert_mean(x, float(law @ diffusion.grid), slack=0.03)


@pytest.mark.parametrize("candidates", [2, 7])
def test_at_zero_temperature_every_step_gains_the_largest_of_its_noise(candidates):
    """Each step raises a linear value by std_i E[max of M normals], propagated through the later steps."""
    diffusion = GaussianDiffusion(4)
    final = run(diffusion, SVDD(candidates), value_of(), 1200)
    mean, _ = diffusion.end_law()
    gain = sum(diffusion.end(i + 1)[0] * diffusion.std(i) for i in range(4)) * largest_of(candidates)
    assert_mean(rewards(final), mean * sum(B) + gain)
    across = final.x.flatten(1) @ torch.tensor([0.8, 0.6], dtype=torch.float64)
    assert_mean(across, mean * 1.4)
    assert_variance(across, diffusion.end_law()[1])


@pytest.mark.parametrize("particles", [1, 2, 9])
def test_the_best_of_n_has_the_largest_of_n_rewards(particles):
    diffusion = GaussianDiffusion(3)
    final = run(diffusion, BestOfN(particles), value_of(), 1200)
    mean, variance = diffusion.end_law()
    assert_mean(rewards(final), mean * sum(B) + math.sqrt(variance) * largest_of(particles))


def test_more_candidates_and_more_particles_raise_the_reward():
    diffusion = GaussianDiffusion(4)
    samplers = [Unguided(), SVDD(2), SVDD(6), SVDD(6, num_particles=4)]
    means = [float(rewards(run(diffusion, sampler, value_of(), 300)).mean()) for sampler in samplers]
    assert means == sorted(means)
    cooler = [float(rewards(run(diffusion, SVDD(6, alpha), value_of(), 300)).mean()) for alpha in (5.0, 0.5, 0.05)]
    assert cooler == sorted(cooler)


# ---- shapes of latents


@pytest.mark.parametrize("shape", [(2, 3, 1, 2), (3, 4)], ids=["channels-frames-height-width", "tokens-width"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_a_sampler_does_not_depend_on_the_shape_of_latents(sampler, shape):
    """Random numbers are drawn in memory order, so latents of another shape and the same size end in the same ones.

    Samplers of spatial frequencies take the last two axes for height and width, and end elsewhere.
    """
    value, plain, other = value_of([0.1] * 12), GaussianDiffusion(4, size=12), GaussianDiffusion(4, shape=shape)
    expected, found = (run(diffusion, sampler, value, prompts=["", "0.5"]) for diffusion in (plain, other))
    assert found.x.shape == (len(expected.x), *shape)
    spatial = isinstance(sampler, CrossEntropySearch) or getattr(sampler, "frequencies", 1) < 1
    assert torch.equal(found.x.flatten(1), expected.x.flatten(1)) != spatial
    assert count(sampler, other, value) == count(sampler, plain, value)


# ---- selections written out


def by_hand(seed: int, particles: int, diffusion) -> torch.Tensor:
    """Returns the ends of `particles` plain chains of one image, [particles, size], computed without svdd's loop."""
    generator = torch.Generator().manual_seed(seed)
    shape = (particles, *diffusion.latent_shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for i in range(diffusion.num_inference_steps):
        factor, constant = diffusion.affine(i)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = factor * x + constant + diffusion.std(i) * noise
    return x.flatten(1)


def test_the_best_of_n_is_the_best_of_the_n_plain_chains():
    diffusion = GaussianDiffusion(4)
    final = run(diffusion, BestOfN(6), value_of(), seeds=[3, 1, 4], prompts=[""] * 3)
    for seed, x in zip([3, 1, 4], final.x.flatten(1), strict=True):
        ends = by_hand(seed, 6, diffusion)
        torch.testing.assert_close(x, ends[(ends @ torch.tensor(B, dtype=torch.float64)).argmax()])


def test_svdd_at_zero_temperature_is_a_greedy_search_written_out():
    diffusion, m, b = GaussianDiffusion(4), 5, torch.tensor(B, dtype=torch.float64)
    final = run(diffusion, SVDD(m), value_of(), seeds=[8, 2], prompts=[""] * 2)
    for seed, x in zip([8, 2], final.x.flatten(1), strict=True):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randn(1, 2, generator=generator, dtype=torch.float64)
        for i in range(4):
            factor, constant = diffusion.affine(i)
            noise = torch.randn(m, 2, generator=generator, dtype=torch.float64)
            children = factor * kept + constant + diffusion.std(i) * noise
            gain = 1 if i == 3 else diffusion.posterior_mean(torch.ones(()), diffusion.signal[i + 1], 0)
            assert gain > 0  # E[x0 | x] is monotone in x, so the best candidate has the largest b . x
            kept = children[(children @ b).argmax()][None]
        torch.testing.assert_close(x, kept[0])


SINGLE = [
    SVDD(1),
    SVDD(1, alpha=0.5),
    SVDD(1, alpha=math.inf),
    BestOfN(1),
    BeamSearch(1, 1),
    BlockwiseBestOfN(1, 2),
    SMC(1),
    SMC(1, ess_threshold=1.0, returns="drawn"),
    ProgressivePruning(1, [(0.0, 1.0)]),
    RandomSearch(1),
    RolloverBudget(1),
]


@pytest.mark.parametrize("sampler", SINGLE, ids=label)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_single_candidate_is_plain_sampling_bit_for_bit(sampler, eta):
    diffusion = GaussianDiffusion(5, eta=eta)
    final = run(diffusion, sampler, value_of(), 7)
    assert torch.equal(final.x, run(diffusion, Unguided(), value_of(), 7).x)
    assert final.context.ledger.reward_calls == 0


def test_a_beam_of_single_candidates_is_best_of_n_bit_for_bit():
    diffusion = GaussianDiffusion(5)
    beam = run(diffusion, SVDD(1, num_particles=4), value_of(), 6)
    assert torch.equal(beam.x, run(diffusion, BestOfN(4), value_of(), 6).x)


def test_one_step_of_svdd_is_the_best_of_its_candidates():
    diffusion, candidates = GaussianDiffusion(1), 8
    final = run(diffusion, SVDD(candidates), value_of(), 5)
    ends = State.start(diffusion, [""] * 5, range(5)).propose(candidates)
    torch.testing.assert_close(rewards(final), rewards(ends).view(5, candidates).max(1).values)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_an_image_is_the_same_alone_in_a_batch_and_in_another_order(sampler):
    diffusion = GaussianDiffusion(3)
    prompts, seeds = ["1", "-2", "", "0.5"], [7, 0, 2**62, 3]
    together = run(diffusion, sampler, value_of(), prompts=prompts, seeds=seeds)
    images = together.x.unflatten(0, (4, -1))
    assert together.prompts == [prompt for prompt in prompts for _ in range(images.shape[1])]
    traces = together.context.trace.per_image(lineage=True)
    order = [2, 0, 3, 1]
    other = run(diffusion, sampler, value_of(), prompts=[prompts[k] for k in order], seeds=[seeds[k] for k in order])
    assert torch.equal(other.x.unflatten(0, (4, -1)), images[order])
    for k in range(4):
        alone = run(diffusion, sampler, value_of(), prompts=prompts[k : k + 1], seeds=seeds[k : k + 1])
        assert torch.equal(alone.x, images[k])
        assert alone.context.trace.per_image(lineage=True) == traces[k : k + 1]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_the_global_generator_is_left_alone(sampler):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(GaussianDiffusion(3), sampler, value_of(), 2).x
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(run(GaussianDiffusion(3), sampler, value_of(), 2).x, first)


# ---- cost


@pytest.mark.parametrize(
    ("sampler", "scored"),  # images scored by the reward, at T = 8
    [
        (Unguided(), 0),
        (BestOfN(1), 0),
        (BestOfN(4), 4),
        (SVDD(1), 0),
        (SVDD(5), 5 * 8),
        (SVDD(3, num_particles=2), 2 * 3 * 8),
        (SVDD(1, num_particles=3), 3),
        (SVDD(4, guide_stop=0.5), 4 * 4),
        (SVDD(3, num_particles=4, score_parent=True), 4 * 7 + 12),
        (BlockwiseBestOfN(3, 4), 3 * 2),
        (SMC(5, alpha=0.7), 5 * 8),
        (SMC(5), 5 * 6),  # from step 3 on, the first at or after a third of the chain
        (SMC(5, guide_every=4), 5 * 2),
        (ProgressivePruning(4), 8 + 4 + 2),
        (ZeroOrderSearch(2, 3), 7),
        (Refinement(2), 4 * 8 + 2 * 4 * 4),
        (Refinement(2, 0.25, sampler=Unguided()), 1 + 2),
        (EvolutionarySearch(2, 3, num_elites=2), 4 + 2 * 3),
        (CrossEntropySearch(2, 3, num_starts=1), 1 + 2 * 3),
        (NoiseOptimisation(3), 3),
        (RolloverBudget(5, 2), 1 + 5 * 8),
        (DPS(1.0), 8),
        (TwistedSMC(4, alpha=0.7), 4 * 9),
        (TwistedSMC(4), 4 * 6),
    ],
    ids=lambda case: label(case) if isinstance(case, Sampler) else str(case),
)
def test_nothing_is_scored_or_decoded_twice(sampler, scored):
    ledger = run(GaussianDiffusion(8), sampler, value_of(), 3).context.ledger
    assert ledger.reward_calls == 3 * scored
    final = run(GaussianDiffusion(8), sampler, value_of(), 3)
    assert final.images is not None
    decoded = final.context.ledger.decoded_images
    assert decoded == 3 * (
        scored + (1 if scored == 0 or isinstance(sampler, DPS) or stops_before_the_end(sampler) else 0)
    )


def stops_before_the_end(sampler) -> bool:
    """Returns whether guidance stops before the last step, so its images are not scored."""
    return getattr(sampler, "window", Window()).stop < 1.0


@pytest.mark.parametrize(("candidates", "particles"), [(5, 1), (3, 2)])
def test_a_value_without_x0_costs_only_the_selected_rows(candidates, particles):
    value = bound(ExactSoftValue(1.0), Linear(B))
    final = run(GaussianDiffusion(4), SVDD(candidates, 1.0, particles), value, 3)
    assert final.context.ledger.denoiser_rows == 3 * particles * 4
    assert final.context.ledger.reward_calls == 3 * particles * candidates  # the last selection uses the reward


def test_a_deterministic_last_step_proposes_no_copies():
    diffusion = GaussianDiffusion(4, last=1.0)
    assert diffusion.std(3) == 0.0
    final = run(diffusion, SVDD(5), value_of(), 2)
    assert final.context.ledger.denoiser_rows == 2 * (1 + 5 * 3)
    assert final.context.ledger.reward_calls == 2 * 5 * 3
    beam = run(diffusion, SVDD(5, num_particles=3), value_of(), 2)
    assert beam.context.ledger.denoiser_rows == 2 * 3 * (1 + 5 * 3)
    assert beam.context.ledger.reward_calls == 2 * (15 * 3 + 3)


# ---- refusals


def test_candidates_need_noise():
    diffusion = GaussianDiffusion(3, eta=0.0)
    with pytest.raises(UserError, match=r"num_candidates=20 needs a chain with noise: with eta=0 .*set eta above 0"):
        SVDD().check(diffusion, value_of())
    for sampler in (SVDD(1), BestOfN(5), Unguided()):
        sampler.check(diffusion, value_of())
    SVDD().check(GaussianDiffusion(3, eta=0.01), value_of())
    for sampler in (BeamSearch(), BlockwiseBestOfN(), SMC(), RolloverBudget()):
        with pytest.raises(UserError, match="needs a chain with noise"):
            sampler.check(diffusion, value_of())
    for sampler in (TwistedSMC(), TwistedSMC(1), TwistedSMC(ess_threshold=0)):
        with pytest.raises(UserError, match="no step would be guided"):
            sampler.check(diffusion, value_of())
    for sampler in (
        ProgressivePruning(),
        RandomSearch(),
        ZeroOrderSearch(),
        EvolutionarySearch(),
        SMC(ess_threshold=0),
    ):
        sampler.check(diffusion, value_of())
    with pytest.raises(UserError, match="with eta=0 there is none; set eta above 0"):
        DPS().check(diffusion, value_of())


@pytest.mark.parametrize(
    "sampler",
    [SVDD(4, guide_every=9), BeamSearch(guide_every=9), BlockwiseBestOfN(guide_start=0.85), DPS(guide_every=9)],
    ids=label,
)
def test_a_window_without_a_selection_is_refused(sampler):
    """The last step of some chains draws no noise, so a window with that step alone would have no effect."""
    with pytest.raises(UserError, match="no step would be guided"):
        sampler.check(GaussianDiffusion(9, last=1.0), value_of())
    sampler.check(GaussianDiffusion(9, last=0.97), value_of())


@pytest.mark.parametrize("sampler", [DPS(), TwistedSMC()], ids=label)
def test_a_reward_without_gradient_is_refused_by_name(sampler):
    value = bound(PosteriorMean(), Compressibility())
    message = f"{type(sampler).__name__} needs gradients, and reward Compressibility is not differentiable"
    with pytest.raises(UserError, match=message):
        sampler.check(GaussianDiffusion(3), value)
    blind = bound(GridSoftValue(MixtureDiffusion(2), np.ones(701), 1.0), Linear([1.0]))
    with pytest.raises(UserError, match="value GridSoftValue is not differentiable"):
        sampler.check(GaussianDiffusion(3), blind)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SVDD(num_candidates=0), "num_candidates must be >= 1, got 0"),
        (lambda: SVDD(num_particles=0), "num_particles must be >= 1, got 0"),
        (lambda: SVDD(alpha=-1), "alpha must be >= 0 or auto, got -1"),
        (lambda: SVDD(alpha=math.nan), "alpha must be >= 0 or auto, got nan"),
        (lambda: BestOfN(0), "num_particles must be >= 1, got 0"),
        (lambda: SVDD(guide_start=0.5, guide_stop=0.5), "guide_start and guide_stop must satisfy"),
        (lambda: SVDD(guide_every=0), "guide_every must be >= 1, got 0"),
        (lambda: SVDD(score_parent=True), "score_parent needs num_particles > 1"),
        (lambda: SVDD(4, num_particles=4, score_parent=True), "score_parent needs num_candidates < num_particles"),
        (lambda: BeamSearch(score_parent=True), "score_parent needs num_candidates < num_particles"),
        (lambda: BeamSearch(num_beams=0), "num_beams must be >= 1, got 0"),
        (lambda: BeamSearch(num_candidates=0), "num_candidates must be >= 1, got 0"),
        (lambda: BlockwiseBestOfN(block_size=0), "block_size must be >= 1, got 0"),
        (lambda: BlockwiseBestOfN(alpha=-0.1), "alpha must be >= 0 or auto, got -0.1"),
        (lambda: BlockwiseBestOfN(block_size=1, score_parent=True), "score_parent needs block_size > 1"),
        (lambda: SMC(num_particles=0), "num_particles must be >= 1, got 0"),
        (lambda: SMC(alpha="own"), r"alpha must be > 0 or auto, got 'own' \(str\)"),
        (lambda: SMC(alpha=0), "alpha must be > 0 or auto, got 0; for the limit of alpha = 0 use SVDD"),
        (lambda: SMC(ess_threshold=1.5), "ess_threshold must lie in 0 .. 1"),
        (lambda: SMC(potential="min"), "potential must be one of difference, max, sum, immediate, got 'min'"),
        (lambda: SMC(resampler="best"), "resampler must be one of multinomial, .*, got 'best'"),
        (lambda: SMC(tempering="fast"), "tempering must be one of none, .*, got 'fast'"),
        (lambda: SMC(tempering="adaptive", potential="max"), "goes with potential 'difference' only, got 'max'"),
        (lambda: SMC(tempering="adaptive", ess_threshold=0), "which must lie between 0 and 1, got 0"),
        (lambda: SMC(tempering="adaptive", ess_threshold=1), "which must lie between 0 and 1, got 1"),
        (lambda: SMC(returns="two"), "returns must be one of best, drawn, all, got 'two'"),
        (lambda: TwistedSMC(returns="two"), "returns must be one of best, drawn, all, got 'two'"),
        (lambda: ProgressivePruning(0), "num_particles must be >= 1, got 0"),
        (lambda: ProgressivePruning(2, []), "fractions must rise from 0 to below 1"),
        (lambda: ProgressivePruning(2, [(0.1, 1)]), "fractions must rise from 0 to below 1"),
        (lambda: ProgressivePruning(2, [(0, 1), (0.5, 2)]), "survivors must be positive and must not rise"),
        (lambda: RandomSearch(0), "num_candidates must be >= 1, got 0"),
        (lambda: ZeroOrderSearch(0), "num_iterations must be >= 1, got 0"),
        (lambda: ZeroOrderSearch(radius=0), "radius must lie above 0 and be at most 1, got 0"),
        (lambda: ZeroOrderSearch(decay=1.1), "decay must lie above 0 and be at most 1, got 1.1"),
        (lambda: EvolutionarySearch(num_elites=0), "num_elites must be >= 1, got 0"),
        (lambda: EvolutionarySearch(frequencies=0), "frequencies must lie above 0 and be at most 1, got 0"),
        (lambda: CrossEntropySearch(shrinkage=-0.1), "shrinkage must lie in 0 .. 1, got -0.1"),
        (lambda: CrossEntropySearch(frequencies=2), "frequencies must lie above 0 and be at most 1, got 2"),
        (lambda: Refinement(0), "rounds must be >= 1, got 0"),
        (lambda: Refinement(strength=0), "strength must lie above 0 and be at most 1, got 0"),
        (lambda: Refinement(strength=1.5), "strength must lie above 0 and be at most 1, got 1.5"),
        (lambda: Refinement(alpha=math.nan), "alpha must be >= 0, got nan"),
        (lambda: NoiseOptimisation(0), "num_iterations must be >= 1, got 0"),
        (lambda: NoiseOptimisation(learning_rate=0), "learning_rate must be > 0, got 0"),
        (lambda: NoiseOptimisation(clip=-1), "clip must be > 0, got -1"),
        (lambda: NoiseOptimisation(momentum=1), "momentum must be >= 0 and below 1, got 1"),
        (lambda: NoiseOptimisation(regularisation=math.inf), "regularisation must be a finite number >= 0, got inf"),
        (lambda: RolloverBudget(0), "num_candidates must be >= 1, got 0"),
        (lambda: RolloverBudget(batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: RolloverBudget(num_starts=0), "num_starts must be >= 1, got 0"),
        (lambda: DPS(-1), "scale must be a finite number >= 0, got -1"),
        (lambda: DPS(math.inf), "scale must be a finite number >= 0, got inf"),
    ],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


COUNT, NUMBER = [8.0, 2.5, True, None, "4", [4], math.nan], [True, None, "x", [0.5]]
WRONG = {int: COUNT, int | None: [each for each in COUNT if each is not None], Counts: [*COUNT[:5], (4, 2)]}
WRONG |= {float: NUMBER, float | None: NUMBER[:1], Alpha: [*NUMBER, "Auto", math.nan]}
CLASSES = [getattr(svdd.samplers, name) for name in svdd.samplers.__all__ if name != "Sampler"]


@pytest.mark.parametrize("kind", [*CLASSES, PosteriorMean, Lookahead, Screened, SoftLoss, GuidedDiffusion])
def test_arguments_of_a_wrong_type_are_named_with_what_came(kind):
    given = {Screened: {"cheap": PosteriorMean(), "exact": PosteriorMean()}, GuidedDiffusion: {"reward": Linear(B)}}
    for name, hint in get_type_hints(kind.__init__).items():
        wrong = [*WRONG.get(hint, ()), *(["auto"] if (kind, name) == (Refinement, "alpha") else ())]
        for each in wrong:
            with pytest.raises(ValueError, match=rf"^{name} must be .*, got .*\w") as caught:
                kind(**given.get(kind, {}), **{name: each})
            assert str(each) in str(caught.value) or repr(each) in str(caught.value)
    assert kind is Unguided or any(hint in WRONG for hint in get_type_hints(kind.__init__).values())


def test_a_value_without_a_reward_has_an_actionable_error():
    with pytest.raises(UserError, match=r"PosteriorMean has no reward yet: call value.bind\(reward, diffusion\)"):
        run(GaussianDiffusion(2), SVDD(2), PosteriorMean(), 1)


def test_on_step_is_called_for_every_step_and_every_mean_value():
    calls = []
    start = Start(GaussianDiffusion(3), ["", ""], [0, 1])
    start.context.on_step = lambda i, value: calls.append((i, value))
    SVDD(4)(start, value_of())
    assert [i for i, value in calls if value is None] == [1, 2, 3]
    assert [i for i, value in calls if value is not None] == [1, 2, 3]
    assert all(math.isfinite(value) for _, value in calls if value is not None)
