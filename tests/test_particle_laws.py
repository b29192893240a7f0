"""Particle samplers against closed forms: the tilted law, the normalising constant, and the limits."""

import math
from itertools import pairwise

import pytest
import torch

from svdd import UserError
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
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
from svdd.samplers.toolbox.selection import RESAMPLERS
from svdd.samplers.toolbox.weights import POTENTIALS, Weighing, Weights
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, PlaneMixtureDiffusion, Quadratic, bound, run
from tests.test_samplers import B, assert_mean, assert_variance, label, rewards, value_of

ALPHA = 0.7
ACROSS = torch.tensor([0.8, 0.6], dtype=torch.float64)  # orthogonal to B, so the reward has no effect there


def tilted_gaussian(diffusion: GaussianDiffusion, alpha=ALPHA):
    """Returns mean and variance of b . x_T under p(x) exp(b . x / alpha): a shift by V / alpha, the same variance."""
    mean, variance = diffusion.end_law()
    return mean * sum(B) + variance / alpha, variance


def true_log_normaliser(diffusion: GaussianDiffusion) -> float:
    """Returns log E[exp(b . x_T / alpha)] of a Gaussian."""
    mean, variance = diffusion.end_law()
    return mean * sum(B) / ALPHA + variance / (2 * ALPHA**2)


def estimated_normalisers(final) -> torch.Tensor:
    """Returns each image's estimate of Z, from its trace."""
    traces = final.context.trace.per_image()
    return torch.tensor([math.exp(sum(trace["log_normaliser"])) for trace in traces], dtype=torch.float64)


# ---- the target


WIDE = {"first": 0.6, "eta": 0.7}  # 70 % of the final variance comes from the start, so the start must be tilted


@pytest.mark.parametrize(
    "sampler",
    [
        SMC(1000, ALPHA, returns="all"),
        SMC(1000, ALPHA, returns="all", ess_threshold=0.0),
        SMC(1000, ALPHA, returns="all", ess_threshold=1.0, resampler="multinomial"),
        SMC(1000, ALPHA, returns="all", tempering="adaptive", resampler="residual"),
        SMC(1000, ALPHA, returns="all", potential="max", tempering="exponential", resampler="stratified"),
        # sums of values overshoot at intermediate steps: their bias falls slowly with N, slower at low alpha
        SMC(2000, 3 * ALPHA, returns="all", potential="sum", tempering="linear", resampler="systematic"),
        SMC(1000, ALPHA, returns="all", potential="immediate", tempering="linear"),
        SMC(1000, ALPHA, returns="all", guide_start=0.3, guide_stop=0.8, guide_every=2),
        TwistedSMC(400, ALPHA, returns="all"),
        TwistedSMC(400, ALPHA, returns="all", tempering="none", ess_threshold=1.0, resampler="multinomial"),
        TwistedSMC(400, ALPHA, returns="all", tempering="adaptive", guide_start=0.2),
        SMC(1000, returns="all"),  # alpha depends on the particles: a bias of O(1 / N)
        TwistedSMC(400, returns="all"),
    ],
    ids=lambda sampler: "-".join([type(sampler).__name__, *(f"{k}={v}" for k, v in sampler.arguments[1].items())]),
)
def test_weighted_particles_follow_the_tilted_gaussian(sampler):
    """Checks mean and variance along B and orthogonal to it; each image gives one independent estimate."""
    diffusion, images = GaussianDiffusion(6, **WIDE), 100
    final = run(diffusion, sampler, value_of(), images)
    weights = final.context.trace.weights
    torch.testing.assert_close(weights.sum(1), torch.ones(images, dtype=torch.float64))
    alpha = torch.tensor([[found["alpha"]] for found in final.context.trace.statistics(images)], dtype=torch.float64)
    mean, variance = tilted_gaussian(diffusion, alpha)
    untilted = diffusion.end_law()[0] * 1.4
    for x, centre in ((rewards(final), mean), (final.x.flatten(1) @ ACROSS, untilted)):
        x = x.view(images, -1) - centre
        assert_mean((weights * x).sum(1), 0.0)
        assert_mean((weights * x**2).sum(1), variance)


@pytest.mark.parametrize(
    "sampler", [SMC(1000, ALPHA, returns="drawn"), TwistedSMC(400, ALPHA, returns="drawn")], ids=["SMC", "TwistedSMC"]
)
def test_a_drawn_particle_follows_the_tilted_gaussian(sampler):
    diffusion = GaussianDiffusion(6, **WIDE)
    final = run(diffusion, sampler, value_of(), 400)
    mean, variance = tilted_gaussian(diffusion)
    assert_mean(rewards(final), mean)
    assert_variance(rewards(final), variance)


@pytest.mark.parametrize(
    ("sampler", "tilts_start"),
    [
        (SVDD(64, ALPHA), False),
        (SVDD(64, ALPHA, choose_start=True), True),
        (SVDD(4, ALPHA, num_particles=48), True),  # exact as the number of particles grows
        (SVDD(16, ALPHA, num_particles=4, choose_start=True), True),
        (BlockwiseBestOfN(64, 2, ALPHA), False),
        (BlockwiseBestOfN(64, 2, ALPHA, choose_start=True), True),
    ],
    ids=lambda case: label(case) if isinstance(case, Sampler) else str(case),
)
def test_the_law_of_soft_selection_depends_on_the_choice_of_the_start(sampler, tilts_start):
    """A chosen start is tilted too, else only the noise of the steps; a parent's value is not counted twice."""
    diffusion = GaussianDiffusion(6, **WIDE)
    final = run(diffusion, sampler, bound(ExactSoftValue(ALPHA), Linear(B)), 1000)
    mean, variance = diffusion.end_law()
    shift = (
        variance if tilts_start else diffusion.end(0)[2]
    ) / ALPHA  # of N(., V), tilted by exp(r / alpha): V / alpha
    assert_mean(rewards(final), mean * sum(B) + shift, slack=0.03 * shift)
    assert_variance(rewards(final), variance, slack=0.02)


def test_a_mixture_in_the_plane_keeps_its_modes_in_proportion_and_in_place():
    """Mode weights and the mean within each mode, under a quadratic reward, against the tilted law on a grid."""
    diffusion, alpha, images = PlaneMixtureDiffusion(8), 3.0, 60
    reward = Quadratic([2.5, 2.0])
    final = run(diffusion, SMC(1000, alpha, returns="all"), bound(PosteriorMean(), reward), images)
    tilt = torch.exp(reward(diffusion.grid.view(-1, 1, 1, 2).expand(-1, 3, -1, -1), []) / alpha)
    plain = diffusion.end_law()
    law = plain * tilt / (plain * tilt).sum()
    centres = torch.tensor(diffusion.means, dtype=torch.float64)

    def mode(x):
        return torch.cdist(x, centres).argmin(1)

    x, cells = final.x.flatten(1), mode(diffusion.grid)
    home, weights = mode(x).view(images, -1), final.context.trace.weights
    for k in range(3):
        inside, outside = law * (cells == k), plain * (cells == k)
        assert abs(float(inside.sum() - outside.sum())) > 0.1  # the tilt is not small
        share = (weights * (home == k)).sum(1)
        assert_mean(share, float(inside.sum()))
        for axis in range(2):
            centre, untilted = (float(part @ diffusion.grid[:, axis] / part.sum()) for part in (inside, outside))
            estimates = (weights * (home == k) * x[:, axis].view(images, -1)).sum(1) / share
            assert_mean(estimates, centre)
            assert abs(centre - untilted) > 4 * float(estimates.std()) / math.sqrt(images)  # must be tilted


# ---- the normalising constant


@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0], ids=["never", "adaptive", "every step"])
@pytest.mark.parametrize("potential", list(POTENTIALS))
@pytest.mark.parametrize("resampler", list(RESAMPLERS))
def test_the_estimate_of_the_normalising_constant_is_unbiased(resampler, potential, ess_threshold):
    diffusion = GaussianDiffusion(5)
    tempering = "none" if potential == "difference" else "linear"
    sampler = SMC(32, ALPHA, potential, resampler, ess_threshold, tempering)
    estimates = estimated_normalisers(run(diffusion, sampler, value_of(), 200))
    assert_mean(estimates / math.exp(true_log_normaliser(diffusion)), 1.0)


@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0], ids=["never", "adaptive", "every step"])
@pytest.mark.parametrize("tempering", ["none", "linear", "exponential"])
def test_twisting_leaves_the_estimate_unbiased_and_makes_it_sharper(tempering, ess_threshold):
    diffusion, truth = GaussianDiffusion(5), math.exp(true_log_normaliser(GaussianDiffusion(5)))
    options = {"ess_threshold": ess_threshold, "tempering": tempering}
    twisted = estimated_normalisers(run(diffusion, TwistedSMC(32, ALPHA, **options), value_of(), 200)) / truth
    plain = estimated_normalisers(run(diffusion, SMC(32, ALPHA, **options), value_of(), 200)) / truth
    assert_mean(twisted, 1.0)
    assert float(twisted.std()) < float(plain.std())


def test_incremental_weights_of_the_exact_value_average_one_from_any_state():
    diffusion, children = GaussianDiffusion(5), 20000
    value = bound(ExactSoftValue(ALPHA), Linear(B))
    state = State.start(diffusion, [""] * 3, range(3))
    while not state.done:
        weighing = Weighing(ALPHA, "difference", "ssp", 0.0, "none")
        before = Weights.equal(3, children, state.x.device)
        parent = value(state).view(-1, 1).expand(-1, children)
        moved = state.propose(children)
        before = weighing.weigh(before, parent, state.i / 5)
        after = weighing.weigh(before, value(moved).view(3, -1), moved.i / 5)
        for k in range(3):
            assert_mean((after.log_w - parent / ALPHA).exp()[k], 1.0)
        state = state.propose()


def test_the_bias_of_svdd_falls_as_candidates_grow():
    """With the exact soft value the bias of M candidates is O(1 / M)."""
    diffusion = GaussianDiffusion(4)
    value = bound(ExactSoftValue(ALPHA), Linear(B))
    start, drift = diffusion.end_law()[0] * sum(B), diffusion.end(0)[2] / ALPHA
    gaps = []
    for candidates in (2, 4, 16):
        final = run(diffusion, SVDD(candidates, ALPHA), value, 4000)
        gaps.append(start + drift - float(rewards(final).mean()))
    error = 2 * math.sqrt(diffusion.end_law()[1] / 4000)
    assert gaps[0] > gaps[1] + error > gaps[2] + 2 * error > error


# ---- limits


def test_infinite_temperature_leaves_all_chains_alone():
    diffusion = GaussianDiffusion(5)
    plain = State.start(diffusion, [""] * 3, range(3), 4)
    while not plain.done:
        plain = plain.propose()
    for sampler in (SMC(4, math.inf, returns="all"), TwistedSMC(4, math.inf, returns="all")):
        final = run(diffusion, sampler, value_of(), 3)
        assert torch.equal(final.x, plain.x)
        assert torch.equal(final.context.trace.weights, torch.full((3, 4), 0.25, dtype=torch.float64))


def test_one_particle_without_gradient_is_plain_sampling():
    diffusion = GaussianDiffusion(5)
    plain = run(diffusion, Unguided(), value_of(), 6).x
    for sampler in (TwistedSMC(1, math.inf), DPS(0.0), DPS(0.0, through_denoiser=False)):
        assert torch.equal(run(diffusion, sampler, value_of(), 6).x, plain)


def test_no_resampling_returns_the_best_of_n():
    diffusion = GaussianDiffusion(5)
    best = run(diffusion, BestOfN(6), value_of(), 5).x
    assert torch.equal(run(diffusion, SMC(6, ALPHA, ess_threshold=0.0), value_of(), 5).x, best)
    whole = ProgressivePruning(6, [(0.0, 1.0)])
    assert torch.equal(run(diffusion, whole, value_of(), 5).x, best)


def test_a_beam_is_svdd_at_zero_temperature_and_a_block_of_one_step_is_svdd():
    diffusion = GaussianDiffusion(5)
    assert torch.equal(
        run(diffusion, BeamSearch(3, 4), value_of(), 5).x, run(diffusion, SVDD(4, num_particles=3), value_of(), 5).x
    )
    for options in ({}, {"alpha": 0.5}, {"guide_start": 0.4, "guide_stop": 0.8}):
        block = run(diffusion, BlockwiseBestOfN(4, 1, **options), value_of(), 5)
        assert torch.equal(block.x, run(diffusion, SVDD(4, **options), value_of(), 5).x)


def test_one_block_is_the_best_of_several_runs_from_one_start():
    diffusion = GaussianDiffusion(5)
    final = run(diffusion, BlockwiseBestOfN(6, 5), value_of(), 4)
    runs = State.start(diffusion, [""] * 4, range(4)).propose(6)
    while not runs.done:
        runs = runs.propose()
    assert torch.equal(rewards(final), rewards(runs).view(4, 6).max(1).values)
    from_several = run(diffusion, BlockwiseBestOfN(6, 5, choose_start=True), value_of(), 4)
    assert torch.equal(from_several.x, run(diffusion, BestOfN(6), value_of(), 4).x)


def test_the_chosen_start_is_the_one_of_the_highest_value():
    diffusion, b = GaussianDiffusion(3, eta=0.0), torch.tensor(B, dtype=torch.float64)
    final = run(diffusion, SVDD(5, choose_start=True), value_of(), 2)
    starts = State.start(diffusion, [""] * 2, range(2), 5)
    plain = starts.select((starts.x0.flatten(1) @ b).view(2, 5).argmax(1, keepdim=True))
    while not plain.done:
        plain = plain.propose()
    assert torch.equal(final.x, plain.x)
    assert [selection.i for selection in final.context.trace.selections] == [0]


def test_selection_by_blocks_written_out():
    diffusion, b = GaussianDiffusion(4), torch.tensor(B, dtype=torch.float64)
    final = run(diffusion, BlockwiseBestOfN(3, 2), value_of(), 1)
    state = State.start(diffusion, [""], [0])
    for _ in range(2):
        state = state.propose(3).propose()
        ahead = state.x0.flatten(1) @ b
        state = state.select(ahead.argmax().view(1, 1))
    assert torch.equal(final.x, state.x)


def test_score_parent_keeps_the_children_of_the_best_beams():
    """Children inherit their parent's score: the best two of 4 beams keep two children each."""
    diffusion, b = GaussianDiffusion(3), torch.tensor(B, dtype=torch.float64)
    final = run(diffusion, SVDD(2, num_particles=4, score_parent=True), value_of(), 1)
    state = State.start(diffusion, [""], [0], 4)
    for i in range(3):
        ahead = state.x0.flatten(1) @ b
        candidates = state.propose(2)
        if i < 2:
            parents = ahead.argsort(descending=True)[:2]
            state = candidates.select(torch.stack([2 * parents, 2 * parents + 1], 1).view(1, 4))
    best = (candidates.x.flatten(1) @ b).argmax()
    assert torch.equal(final.x[0], candidates.x[best])


# ---- the temperature `auto`


@pytest.mark.parametrize(
    "sampler",
    [
        *(SMC(returns="all", tempering=tempering) for tempering in ("none", "linear", "adaptive")),
        SMC(resampler="systematic", returns="all"),
        TwistedSMC(returns="all"),
        SVDD(4, "auto"),
        SVDD(4, "auto", 3),
        BlockwiseBestOfN(4, 2, "auto"),
    ],
    ids=label,
)
def test_auto_fits_rewards_of_any_scale(sampler):
    """Multiplied by a power of two, rewards give the same ends bit for bit; by 1000, up to the rounding of rewards."""
    diffusion, b = GaussianDiffusion(8), torch.tensor(B, dtype=torch.float64)
    plain = run(diffusion, sampler, value_of(), 20)
    for factor, exact in ((2.0**10, True), (2.0**-20, True), (1000.0, False)):
        scaled = run(diffusion, sampler, value_of((factor * b).tolist()), 20)
        torch.testing.assert_close(scaled.x, plain.x, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)
        for one, other in zip(*(final.context.trace.statistics(20) for final in (plain, scaled)), strict=True):
            assert other["alpha"] == pytest.approx(factor * one["alpha"], rel=1e-5)
            assert other["resamplings"] == one["resamplings"] > 0 or isinstance(sampler, TwistedSMC)
    ess = [found["ess"] for found in plain.context.trace.statistics(20)]
    assert 0.2 < sum(ess) / 20 < 0.8


@pytest.mark.parametrize("sampler", [SMC(4, returns="all"), TwistedSMC(4, returns="all"), SMC(1)], ids=label)
def test_auto_leaves_chains_alone_where_nothing_differs(sampler):
    """Equal values and a single particle have no spread: no division by zero, equal weights."""
    diffusion, n = GaussianDiffusion(6), sampler.num_particles
    plain = State.start(diffusion, [""] * 2, range(2), n)
    while not plain.done:
        plain = plain.propose()
    final = run(diffusion, sampler, value_of([0.0, 0.0]), 2)
    assert torch.equal(final.x, plain.x)
    assert (
        final.context.trace.statistics(2)
        == [{"choices": 0, "resamplings": 0, **({"spread": 0, "ess": 1} if n > 1 else {})}] * 2
    )
    with pytest.raises(UserError, match="num_particles=1 is one; set alpha to a number"):
        TwistedSMC(1).check(diffusion, value_of())
    with pytest.raises(UserError, match=r"guides from a third of the chain on, and guide_stop=0.25 .* no such step"):
        TwistedSMC(guide_stop=0.25).check(GaussianDiffusion(8), value_of())


@pytest.mark.parametrize(
    "options", [*((name, "ssp", 0.5, "none") for name in POTENTIALS), ("difference", "ssp", 0.5, "adaptive")]
)
def test_equal_values_leave_no_trace_in_the_weights_of_auto(options):
    """As with a reward that is the same for all early predictions."""
    weighing, equal = Weighing("auto", *options), Weights.equal(1, 4, torch.device("cpu"))
    later = torch.tensor([[-2.0, -3.0, -4.0, -5.0]])
    after, fresh = (
        weighing.weigh(weighing.weigh(equal, torch.full((1, 4), -2.0), 0.4), later, 0.6),
        weighing.weigh(equal, later, 0.6),
    )
    torch.testing.assert_close(after, fresh)


def test_auto_is_half_the_standard_deviation_of_the_first_values_that_are_weighed():
    diffusion, b = GaussianDiffusion(8), torch.tensor(B, dtype=torch.float64)
    state = State.start(diffusion, [""], [0], 6)
    while state.i < 3:  # the first step at or after a third of the chain
        state = state.propose()
    expected = float((state.x0.flatten(1) @ b).std()) / 2
    for selection in run(diffusion, SMC(6), value_of(), 1).context.trace.selections:
        assert selection.alpha.item() == pytest.approx(expected, rel=1e-6)


# ---- gradients


@pytest.mark.parametrize("through_denoiser", [True, False])
def test_dps_shifts_every_step_by_the_gradient(through_denoiser):
    """The gradient of a linear reward is b times dx0/dx, or b with `through_denoiser=False`."""
    diffusion, scale = GaussianDiffusion(6), 1.3
    guided = run(diffusion, DPS(scale, through_denoiser, guide_start=0.3), value_of(), 5)
    plain = run(diffusion, Unguided(), value_of(), 5)
    shift = 0.0
    for i in range(2, 6):
        slope = diffusion.posterior_mean(torch.ones(()), diffusion.signal[i], 0) - diffusion.posterior_mean(
            torch.zeros(()), diffusion.signal[i], 0
        )
        shift += diffusion.end(i + 1)[0] * scale * diffusion.std(i) ** 2 * (float(slope) if through_denoiser else 1.0)
    expected = plain.x.flatten(1) + shift * torch.tensor(B, dtype=torch.float64)
    torch.testing.assert_close(guided.x.flatten(1), expected, atol=1e-6, rtol=1e-6)
    assert guided.context.ledger.gradient_rows == (5 * 4 if through_denoiser else 0)


def test_dps_traces_the_value_of_every_guided_step():
    final = run(GaussianDiffusion(5), DPS(1.0, guide_start=0.4), value_of(), 2)
    traces = final.context.trace.per_image()
    assert [trace["step"] for trace in traces] == [[2, 3, 4]] * 2
    for trace in traces:
        assert trace["value_mean"] == trace["value_max"] == trace["value_chosen"]


def test_an_impossible_gradient_is_refused():
    diffusion, value = GaussianDiffusion(4), bound(ExactSoftValue(ALPHA), Linear(B))  # a function of x, not of x0
    with pytest.raises(UserError, match="the value has no gradient at x0"):
        run(diffusion, DPS(1.0, through_denoiser=False), value, 1)
    value.most_rows = 0
    with pytest.raises(UserError, match="DPS with through_denoiser=False needs a value of x0"):
        DPS(1.0, through_denoiser=False).check(diffusion, value)
    DPS(1.0).check(diffusion, value)


def test_gradients_of_two_values_are_cached_separately():
    diffusion = GaussianDiffusion(4)
    state = State.start(diffusion, [""], [0])
    along, against = (bound(PosteriorMean(), Linear([b, 0.0])) for b in (1.0, -1.0))
    assert torch.allclose(state.gradient(along)[1], -state.gradient(against)[1])
    assert not torch.equal(state.gradient(along)[1], state.gradient(along, through_denoiser=False)[1])
    assert diffusion.denoised_rows == [1, 1]  # one evaluation for each gradient through the network


def test_gradients_do_not_depend_on_chunks_or_on_the_caller_s_mode():
    whole = run(GaussianDiffusion(4), DPS(1.0), value_of(), 5).x
    with torch.no_grad():
        parts = run(GaussianDiffusion(4, chunk_size=2), DPS(1.0), value_of(), 5).x
    assert torch.equal(parts, whole)
    assert not whole.requires_grad


def test_a_gradient_is_computed_once_and_kept_in_selections():
    diffusion, value = PlaneMixtureDiffusion(4), bound(PosteriorMean(), Quadratic([1.0, -2.0]))
    state = State.start(diffusion, [""] * 2, [0, 1], 3)
    v, slope = state.gradient(value)
    assert diffusion.denoised_rows == [6]
    for k in range(6):
        for axis in range(2):
            step = torch.zeros_like(state.x)
            step[k, 0, 0, axis] = 1e-4
            ends = [
                diffusion.posterior_mean(state.x + sign * step, diffusion.signal[0], 0).flatten(1)[k]
                for sign in (1, -1)
            ]
            rise = [-float((end - value.reward.centre).square().sum()) / 2 for end in ends]
            assert float(slope[k, 0, 0, axis]) == pytest.approx((rise[0] - rise[1]) / 2e-4, abs=1e-5)
    kept = state.select(torch.tensor([[2, 2], [0, 1]]))
    diffusion.denoised_rows.clear()
    assert torch.equal(kept.gradient(value)[1], slope[[2, 2, 3, 4]])
    assert torch.equal(kept.gradient(value)[0], v[[2, 2, 3, 4]])
    kept.propose()
    assert diffusion.denoised_rows == []


# ---- searches over the noise


def test_random_search_is_best_of_n_on_a_chain_without_noise():
    diffusion = GaussianDiffusion(4, eta=0.0)
    best = run(diffusion, BestOfN(5), value_of(), 4).x
    assert torch.equal(run(diffusion, RandomSearch(5), value_of(), 4).x, best)


def test_random_search_gives_all_starts_the_same_noise():
    diffusion = GaussianDiffusion(4)
    final = run(diffusion, RandomSearch(5), value_of(), 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 1, 2, generator=generator, dtype=torch.float64)
    for i in range(4):
        factor, constant = diffusion.affine(i)
        noise = torch.randn(1, 1, 1, 2, generator=generator, dtype=torch.float64)
        x = factor * x + constant + diffusion.std(i) * noise
    torch.testing.assert_close(final.x[0], x[(x.flatten(1) @ torch.tensor(B, dtype=torch.float64)).argmax()])


def test_zero_order_search_never_falls_and_does_not_stall():
    """The incumbent's reward never falls, and the search comes close to the maximum of a smooth reward."""
    diffusion, centre = GaussianDiffusion(4, eta=0.0), [1.2, -0.4]
    value = bound(PosteriorMean(), Quadratic(centre))
    final = run(diffusion, ZeroOrderSearch(60, 4, radius=0.6, decay=0.85), value, 6)
    for trace in final.context.trace.per_image():
        chosen = trace["value_chosen"]
        assert all(a <= b for a, b in pairwise(chosen))
        assert len(set(chosen)) > 8  # it keeps finding better ones
    start = run(diffusion, Unguided(), value, 6)
    assert float(final.scores(value.reward).min()) > -0.005 > float(start.scores(value.reward).max())


def test_a_search_without_success_returns_plain_sampling():
    """If the first image maximises the reward, the search returns it."""
    diffusion = GaussianDiffusion(4)
    first = run(diffusion, Unguided(), value_of(), 1).x
    value = bound(PosteriorMean(), Quadratic(first.flatten().tolist()))
    final = run(diffusion, ZeroOrderSearch(3, 4), value, 1)
    assert torch.equal(final.x, first)


def test_pruning_keeps_the_chains_with_the_highest_early_values():
    diffusion, b = GaussianDiffusion(8), torch.tensor(B, dtype=torch.float64)
    final = run(diffusion, ProgressivePruning(4), value_of(), 1)
    state = State.start(diffusion, [""], [0], 8)
    for i in range(8):
        if keep := {2: 4, 4: 2}.get(i):
            state = state.select((state.x0.flatten(1) @ b).argsort(descending=True)[None, :keep])
        state = state.propose()
    assert torch.equal(final.x[0], state.x[(state.x.flatten(1) @ b).argmax()])


def test_a_late_pruning_happens_at_the_last_step():
    final = run(GaussianDiffusion(5), ProgressivePruning(4, [(0.0, 2.0), (0.99, 0.25)]), value_of(), 1)
    assert [len(selection.kept[0]) for selection in final.context.trace.selections] == [1]
    assert final.context.trace.selections[0].i == 4


def test_every_sampler_beats_plain_sampling():
    diffusion = GaussianDiffusion(8)
    plain = float(rewards(run(diffusion, Unguided(), value_of(), 200)).mean())
    for sampler in (
        BeamSearch(),
        BlockwiseBestOfN(),
        SMC(),
        ProgressivePruning(),
        RandomSearch(),
        ZeroOrderSearch(),
        EvolutionarySearch(),
        CrossEntropySearch(frequencies=1.0),  # of latents of two numbers
        Refinement(),
        NoiseOptimisation(5),
        RolloverBudget(),
        DPS(),
        TwistedSMC(),
        SVDD(guide_every=4),
        SVDD(2, num_particles=4, score_parent=True),
    ):
        assert float(rewards(run(diffusion, sampler, value_of(), 200)).mean()) > plain + 0.2


# ---- traces


def test_the_trace_shows_collapse():
    diffusion = GaussianDiffusion(6)
    fierce = run(diffusion, SMC(8, 0.02, ess_threshold=1.0, returns="all"), value_of(), 3).context.trace
    for trace in fierce.per_image(lineage=True):
        assert trace["step"] == [1, 2, 3, 4, 5, 6]
        assert trace["ancestors"][0] <= 8
        assert trace["ancestors"] == sorted(trace["ancestors"], reverse=True)
        assert trace["ancestors"][-1] < 4
        assert all(1 <= ess <= 8 for ess in trace["ess"])
        assert all(low <= high for low, high in zip(trace["value_mean"], trace["value_max"], strict=True))
        alive = list(range(8))
        for kept, ancestors in zip(trace["lineage"], trace["ancestors"], strict=True):
            alive = [alive[j] for j in kept]
            assert len(set(alive)) == ancestors
    assert all("lineage" not in trace for trace in fierce.per_image())


def test_a_beam_s_trace_holds_the_values_it_chose():
    final = run(GaussianDiffusion(4), BeamSearch(3, 2), value_of(), 2)
    for trace, reward in zip(final.context.trace.per_image(), rewards(final), strict=True):
        assert trace["value_chosen"][-1] == pytest.approx(float(reward), rel=1e-5)
        assert trace["value_max"][-1] == trace["value_chosen"][-1]
        assert trace["ess"] == trace["log_normaliser"] == [None] * 4
