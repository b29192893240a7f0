"""Costs counted on a one-number chain: compared with formulas and real runs, and used to fit a budget."""

import inspect
import math
import random

import numpy as np
import pytest
import torch

from svdd import UserError
from svdd.guided_diffusion import GuidedDiffusion
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import Uncountable, count, current_count, fit_budget
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
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.lookahead import Lookahead
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, bound, run
from tests.test_samplers import SAMPLERS, label

B = [0.6, -0.8]


def value_of(rows: int = 1):
    """Returns a value with a maximum of `rows` denoiser rows per evaluation."""
    value = ExactSoftValue(0.7) if rows == 0 else Lookahead(rows - 1)
    value.most_rows = rows
    return bound(value, Linear(B))


def name_of(case) -> str:
    return label(case) if isinstance(case, Sampler) else str(case)


def formula(sampler: Sampler, steps: int, free: bool) -> tuple[int, int]:
    """Returns denoiser rows and gradient rows per image by the formulas in the samplers' docstrings.

    Args:
        sampler: A sampler with the attributes guide_start, guide_stop and guide_every.
        steps: T.
        free: Whether the value uses no denoiser rows.
    """
    given = current_arguments(sampler)
    n, m = given.get("num_particles", 1), given.get("num_candidates", 1)
    start, stop = (math.ceil(round(given.get(name, 0) * steps, 9)) for name in ("guide_start", "guide_stop"))
    last, every = stop - 1, given.get("guide_every", 1)
    guided = [i for i in range(start, stop) if (last - i) % every == 0]
    paid = sum(i < steps - 1 for i in guided)  # candidates of the last step are final latents
    match sampler:
        case Unguided():
            return steps, 0
        case BestOfN() | SMC():
            return n * steps, 0
        case RandomSearch():
            return m * steps, 0
        case SVDD() | BeamSearch():
            b = given.get("num_beams", n)
            chosen = 0 if free or not given.get("choose_start") else m - 1
            return b * (steps + chosen + (0 if free or given["score_parent"] else (m - 1) * paid)), 0
        case BlockwiseBestOfN():
            inside = range(start, stop)
            ends = {i for i in inside if (last - i) % given["block_size"] == 0}
            rows = steps + (m - 1) * (
                min(start + 1, steps) if given["choose_start"] else 0
            )  # the starts reach the first block's end
            for i in inside:
                alone = (i == start and not given["choose_start"]) or i - 1 in ends  # a block begins
                skips = i in ends and (free or (given["score_parent"] and not alone))
                rows += (m - 1) * (i < steps - 1 and not skips)
            return rows, 0
        case ProgressivePruning():
            final = steps - 1
            survivors = [
                max(
                    1,
                    int(n * min(s for f, s in given["schedule"] if i >= min(round(f * steps), final) and (i or not f))),
                )
                for i in range(steps)
            ]
            return sum(survivors) if free else survivors[0] + sum(survivors[:-1]), 0
        case ZeroOrderSearch():
            return (1 + given["num_iterations"] * m) * steps, 0
        case EvolutionarySearch() | CrossEntropySearch():
            return (given["num_starts"] + given["num_generations"] * m) * steps, 0
        case Refinement():
            inner = given["sampler"] or SVDD(4)  # without a window
            repeated = max(1, round(given["strength"] * steps))
            return formula(inner, steps, free)[0] + given["rounds"] * formula(inner, repeated, free)[0], 0
        case NoiseOptimisation():
            return given["num_iterations"] * steps, (given["num_iterations"] - 1) * steps
        case RolloverBudget():
            return steps if free else steps - 1 + given["num_starts"] + (m - 1) * (steps - 1), 0
        case DPS():
            return steps, len(guided) if given["through_denoiser"] and not free else 0
        case TwistedSMC():
            weighed = [i for i in guided if given["alpha"] != "auto" or 3 * i >= steps]
            return n * steps, 0 if free else n * len(weighed)
    raise AssertionError(sampler)


def current_arguments(sampler: Sampler) -> dict:
    positional, named = sampler.arguments
    bound_arguments = inspect.signature(type(sampler)).bind(*positional, **named)
    bound_arguments.apply_defaults()
    return bound_arguments.arguments


# ---- counts


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("rows", [0, 1])
def test_the_counted_cost_is_the_formula_and_the_ledger(sampler, steps, rows):
    if rows == 0 and isinstance(sampler, DPS) and not current_arguments(sampler)["through_denoiser"]:
        pytest.skip("refused by check")
    if rows == 0 and current_arguments(sampler).get("score_parent"):
        pytest.skip("a parent's score needs its x0 anyway")
    diffusion, value = GaussianDiffusion(steps), value_of(rows)
    cost = count(sampler, diffusion, value)
    returned, expected = cost.returned, formula(sampler, steps, free=rows == 0)
    assert (cost.denoiser_rows * returned, cost.gradient_rows * returned) == expected
    assert cost.rows * returned == expected[0] + 2 * expected[1]
    for images in (1, 3):
        diffusion = GaussianDiffusion(steps)
        final = run(diffusion, sampler, value, images)
        ledger = final.context.ledger
        assert len(final.x) == images * returned
        assert sum(diffusion.denoised_rows) == ledger.denoiser_rows == ledger.network_rows
        for name in ("denoiser_rows", "gradient_rows", "decoded_images", "reward_calls"):
            assert getattr(ledger, name) == images * returned * getattr(cost, name), name
        assert final.images.shape == (images * returned, 3, 1, 2)


@pytest.mark.parametrize(
    ("sampler", "rows"),  # at T = 8, written out
    [
        (Unguided(), 8),
        (BestOfN(4), 4 * 8),
        (SVDD(5), 1 + 5 * 7),
        (SVDD(3, num_particles=2), 2 * (1 + 3 * 7)),
        (SVDD(4, guide_start=0.5), 8 + 3 * 3),  # the steps that leave 4, 5, 6; the last one's candidates are free
        (SVDD(4, guide_stop=0.5), 8 + 3 * 4),
        (SVDD(4, guide_every=2), 8 + 3 * 3),  # those that leave 1, 3, 5, and 7
        (SVDD(3, num_particles=4, score_parent=True), 4 * 8),
        (BeamSearch(3, 2), 3 * (1 + 2 * 7)),
        (BlockwiseBestOfN(3, 4), 1 + 3 * 7),
        (BlockwiseBestOfN(3, 3), 1 + 3 * 7),
        (BlockwiseBestOfN(3, 4, score_parent=True), 2 + 3 * 6),
        (BlockwiseBestOfN(3, 4, guide_start=0.5), 1 + 4 + 3 * 3),
        (SVDD(5, choose_start=True), 5 * 8),
        (SVDD(3, 0.5, 2, choose_start=True), 2 * 3 * 8),
        (BlockwiseBestOfN(3, 4, choose_start=True), 3 * 8),
        (SMC(5), 5 * 8),
        (ProgressivePruning(4), 8 * 3 + 4 * 2 + 2 * 3),  # states 0 .. 2, 3 and 4, 5 .. 7
        (RandomSearch(4), 4 * 8),
        (ZeroOrderSearch(2, 3), 7 * 8),
        (EvolutionarySearch(2, 3), (4 + 2 * 3) * 8),
        (CrossEntropySearch(2, 3, num_starts=5), (5 + 2 * 3) * 8),
        (Refinement(3), 1 + 4 * 7 + 3 * (1 + 4 * 3)),
        (Refinement(2, 0.25, sampler=BestOfN(3)), 3 * 8 + 2 * 3 * 2),
        (NoiseOptimisation(3), 3 * 8 + 2 * 2 * 8),
        (RolloverBudget(5), 1 + 5 * 7),
        (RolloverBudget(5, 2, num_starts=3), 3 + 5 * 7),
        (DPS(1.0), 8 + 2 * 8),
        (DPS(1.0, through_denoiser=False), 8),
        (DPS(1.0, guide_start=0.5), 8 + 2 * 4),
        (TwistedSMC(4), 4 * (8 + 2 * 5)),  # alpha auto: from a third of the chain on
        (TwistedSMC(4, alpha=0.1, returns="all"), 8 + 2 * 8),
    ],
    ids=name_of,
)
def test_costs_written_out(sampler, rows):
    assert count(sampler, GaussianDiffusion(8), value_of()).rows == rows


def test_a_step_without_noise_is_counted_as_one():
    diffusion = GaussianDiffusion(8, last=1.0)  # the last step draws nothing
    assert diffusion.std(7) == 0
    cost = count(SVDD(5), diffusion, value_of())
    assert (cost.denoiser_rows, cost.reward_calls) == (1 + 5 * 7, 5 * 7)


@pytest.mark.parametrize("sampler", [SVDD(5), BestOfN(3), ProgressivePruning(4), TwistedSMC(2)], ids=label)
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_lookahead_value_is_counted_at_its_maximum(sampler, ahead):
    diffusion, value = GaussianDiffusion(6), bound(Lookahead(ahead), Linear(B))
    cost = count(sampler, diffusion, value)
    ledger = run(diffusion, sampler, value, 1).context.ledger
    assert ledger.denoiser_rows + 2 * ledger.gradient_rows <= cost.rows
    assert cost.rows <= (1 + ahead) * count(sampler, diffusion, value_of()).rows


# ---- budgets


@pytest.mark.parametrize(
    ("sampler", "budget", "number"),  # at T = 10
    [
        (SVDD(alpha=0.3), 100, 11),  # 1 + 11 * 9
        (SVDD(num_particles=2), 100, 5),  # 2 (1 + 5 * 9) = 92
        (SVDD(guide_start=0.5), 100, 23),  # 10 + 22 * 4 = 98: the last step's candidates are free
        (BeamSearch(num_beams=3), 100, 3),
        (BestOfN(), 100, 10),
        (BestOfN(), 109, 10),
        (BlockwiseBestOfN(), 100, 11),
        (SMC(alpha=2.0), 99, 9),
        (TwistedSMC(), 130, 5),  # 5 (10 + 2 * 6)
        (TwistedSMC(alpha=0.1, guide_stop=0.5), 130, 6),  # 6 (10 + 2 * 5)
        (RandomSearch(), 10, 1),
        (EvolutionarySearch(), 100, 3),  # 10 (4 + 2 * 3)
        (ZeroOrderSearch(num_candidates=2), 100, 4),  # 10 (1 + 2 * 4)
        (NoiseOptimisation(), 100, 4),  # 10 (4 + 2 * 3)
        (Refinement(strength=0.3), 100, 7),  # 37 + 7 * 9
        (RolloverBudget(num_starts=3), 100, 10),  # 3 + 10 * 9
    ],
    ids=name_of,
)
def test_a_budget_chooses_the_largest_count(sampler, budget, number):
    diffusion = GaussianDiffusion(10)
    model = GuidedDiffusion(Linear(B), diffusion, sampler, budget=budget)
    name = sampler.budget_argument
    ledger = model.draw([""] * 3, [0, 1, 2]).context.ledger
    spent = {"denoiser_rows": ledger.denoiser_rows // 3}
    spent |= {"gradient_rows": ledger.gradient_rows // 3} if ledger.gradient_rows else {}
    assert model.chosen == {name: number, **spent}
    total = spent["denoiser_rows"] + 2 * spent.get("gradient_rows", 0)
    assert total <= budget
    given = current_arguments(sampler)
    assert current_arguments(model.sampler) == given | {name: number}
    assert current_count(fit_budget(sampler, total, diffusion, value_of())) == {name: number}  # met exactly
    assert count(type(sampler)(**given | {name: number + 1}), diffusion, value_of()).rows > budget


@pytest.mark.parametrize(
    ("sampler", "value_rows", "budget", "number"),
    [
        (SVDD(), 2, 200, 11),  # 1 + 2 * 11 * 9: two rows per candidate
        (BestOfN(), 2, 100, 10),  # the value is used at the end, where it costs nothing
        (BlockwiseBestOfN(block_size=5), 0, 100, 12),  # 2 + 12 * 8
        (BestOfN(), 0, 100, 10),
    ],
    ids=name_of,
)
def test_a_budget_includes_the_cost_of_the_value(sampler, value_rows, budget, number):
    chosen = fit_budget(sampler, budget, GaussianDiffusion(10), value_of(value_rows))
    assert current_count(chosen) == {sampler.budget_argument: number}


@pytest.mark.parametrize("budget", [60, 61, 77, 100, 1000])
@pytest.mark.parametrize("schedule", [((0.0, 2.0), (0.25, 1.0), (0.5, 0.5)), ((0.0, 0.3), (0.5, 0.1))])
def test_a_cost_that_rises_in_steps_stays_within_its_budget(budget, schedule):
    diffusion = GaussianDiffusion(10)
    fitted = fit_budget(ProgressivePruning(schedule=schedule), budget, diffusion, value_of())
    larger = ProgressivePruning(current_count(fitted)["num_particles"] + 1, schedule)
    assert count(fitted, diffusion, value_of()).rows <= budget < count(larger, diffusion, value_of()).rows


@pytest.mark.parametrize("sampler", [SVDD(), SMC(), ZeroOrderSearch(), BlockwiseBestOfN()], ids=label)
def test_a_budget_needs_few_counts(sampler, monkeypatch):
    """A linear cost is extrapolated, so the total work stays close to that of one run."""
    runs = []
    sample = type(sampler).sample
    monkeypatch.setattr(type(sampler), "sample", lambda self, *both: runs.append(1) or sample(self, *both))
    fit_budget(sampler, 5000, GaussianDiffusion(50), value_of())
    assert len(runs) <= 6


@pytest.mark.parametrize(
    ("sampler", "value_rows", "budget", "message"),
    [
        (SVDD(), 1, 9, "budget=9 is too small: SVDD with num_candidates=1 costs 10 denoiser rows per image"),
        (
            TwistedSMC(alpha=0.1),
            1,
            29,
            r"TwistedSMC with num_particles=1 costs 30 .* \(a backward pass counts as 2 more\)",
        ),
        (ProgressivePruning(), 2, 14, "ProgressivePruning with num_particles=1 costs 15 denoiser rows"),
        (Unguided(), 1, 99, "budget=99: Unguided has no count that a budget could choose; leave the budget out"),
        (DPS(), 1, 99, "budget=99: DPS has no count that a budget could choose; leave the budget out"),
        (SMC(returns="all"), 1, 50, "budget=50 cannot choose SMC's num_particles: every particle is returned"),
        (TwistedSMC(returns="all"), 1, 50, "cannot choose TwistedSMC's num_particles: every particle is returned"),
        (SVDD(7), 0, 50, "num_candidates: with ExactSoftValue it does not change the cost of 10 denoiser rows"),
        (SVDD(3, num_particles=8, score_parent=True), 1, 200, "num_candidates: with Lookahead it does not change"),
        (BeamSearch(8, 3, score_parent=True), 1, 200, "num_candidates: with Lookahead it does not change"),
        (SVDD(guide_start=0.9), 1, 200, "num_candidates: .* it does not change the cost"),  # the last step alone
    ],
    ids=name_of,
)
def test_a_budget_that_cannot_choose_a_count_is_refused(sampler, value_rows, budget, message):
    with pytest.raises(UserError, match=message):
        fit_budget(sampler, budget, GaussianDiffusion(10), value_of(value_rows))
    with pytest.raises(UserError, match=message):
        GuidedDiffusion(Linear(B), GaussianDiffusion(10), sampler, value_of(value_rows), budget=budget)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="budget must be an integer >= 1, in denoiser rows per image, got 0"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(10), SVDD(), budget=0)


# ---- mistakes in a user's sampler


class Own(Sampler):
    """Plain sampling with one mistake."""

    def __init__(self, mistake=None, number: int = 1) -> None:
        self.mistake = mistake

    def sample(self, start, value):
        state = start(2)
        while not state.done:
            state = state.propose()
        return state if self.mistake is None else self.mistake(state)


MISTAKES = {
    "too few rows": (
        lambda state: state.select(torch.zeros(1, 3, dtype=torch.int64)),
        r"Own.sample returned 3 rows for 2 images; it must return equally many, at least one, per image",
    ),
    "no rows": (
        lambda state: state.select(torch.zeros(state.num_images, 0, dtype=torch.int64)),
        "Own.sample returned 0 rows for [12] images",
    ),
    "not the end": (
        lambda state: Start(GaussianDiffusion(4), [""] * state.num_images, range(state.num_images))().propose(),
        r"Own.sample returned a state at step 1 of 4; it must go on until state.done is true",
    ),
    "no state": (lambda state: state.x, "Own.sample returned a Tensor; it must return the State"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_end_is_named(mistake):
    wrong, message = mistake
    with pytest.raises(UserError, match=message):
        Own(wrong)(Start(GaussianDiffusion(4), ["", ""], [0, 1]), value_of())
    with pytest.raises(UserError, match=message):
        GuidedDiffusion(Linear(B), GaussianDiffusion(4), Own(wrong), value_of()).sample(["", ""])


GLOBAL = {
    "torch": lambda state: torch.randn_like(state.x),
    "numpy": lambda state: np.random.rand(),
    "python": lambda state: random.random(),
}


@pytest.mark.parametrize("draw", GLOBAL.values(), ids=GLOBAL)
def test_a_draw_from_a_global_generator_is_reported_before_sampling(draw):
    def mistake(state):
        draw(state)
        return state

    with pytest.raises(UserError, match=r"Own\.sample draws from a global random generator.*state.propose and uniform"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(4), Own(mistake), value_of())
    GuidedDiffusion(Linear(B), GaussianDiffusion(4), Own(), value_of())


def test_a_forgotten_method_is_named():
    class SparseSVDD(Sampler):
        def smaple(self, start, value):
            return start()

    with pytest.raises(UserError, match=r"^SparseSVDD does not implement Sampler\.sample$"):
        SparseSVDD()


def test_a_sampler_for_one_kind_of_latents_can_draw_but_not_be_counted():
    def needs_two(state):
        assert state.x.shape[-1] == 2
        return state

    sampler = Own(needs_two)
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(4), sampler, value_of())
    assert len(model.sample([""])[0]) == 2
    with pytest.raises(Uncountable, match=r"Own\.sample failed on the chain of one number.*with AssertionError"):
        count(sampler, GaussianDiffusion(4), value_of())


def test_a_budget_argument_that_does_not_exist_is_named():
    class Misnamed(Own):
        budget_argument = "numbre"

    with pytest.raises(UserError, match=r"Misnamed\.budget_argument is 'numbre', which is no argument of Misnamed's"):
        fit_budget(Misnamed(), 100, GaussianDiffusion(4), value_of())
