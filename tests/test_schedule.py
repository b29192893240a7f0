"""Counts of candidates per step: their meaning, their special cases bit for bit, their gain, cost and budgets."""

import json
import math

import pytest
import torch

from svdd import UserError
from svdd.__main__ import main
from svdd.guided_diffusion import GuidedDiffusion
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import count, current_count, fit_budget
from svdd.samplers.svdd import SVDD
from svdd.samplers.toolbox.schedule import Schedule, expand, scaled
from svdd.samplers.toolbox.window import Window
from tests.analytic import GaussianDiffusion, Linear, run
from tests.test_samplers import B, assert_mean, label, largest_of, rewards, value_of

COUNTS = [1, 3, 2, 1, 4, 2, 1, 5, 2, 3]  # of 10 steps


def test_a_stretch_ends_at_its_fraction_and_the_window_decides_within():
    assert expand({0.3: 4, 1.0: 32}, 10) == [4] * 3 + [32] * 7
    assert expand({0.28: 2, 0.5: 3, 1: 5}, 25) == [2] * 7 + [3] * 6 + [5] * 12  # 0.28 * 25 = 7.000000000000001
    assert expand({0.01: 9, 1: 5}, 25) == [9] + [5] * 24
    assert expand(6, 3) == [6, 6, 6]
    schedule = Schedule(COUNTS, Window(0.2, 0.9, 2))
    assert [schedule(i, 10) for i in range(10)] == [1, 1, 2, 1, 4, 1, 1, 1, 2, 1]
    assert (schedule.first, schedule.most) == (1, 5)
    assert scaled({0.5: 2, 1: 6}, 80, 10) == [4] * 5 + [12] * 5
    assert scaled(COUNTS, 1, 10) == [1] * 10


@pytest.mark.parametrize(
    ("listed", "windowed"),
    [
        (SVDD({0.3: 1, 0.9: 4, 1: 1}), SVDD(4, guide_start=0.3, guide_stop=0.9)),
        (SVDD([1, 3] * 5, 0.5), SVDD(3, 0.5, guide_every=2)),
        (SVDD({0.2: 4, 1: 4}, 0.5, 2, choose_start=True), SVDD(4, 0.5, 2, choose_start=True)),
        (BeamSearch(2, {0.3: 1, 1.0: 4}), BeamSearch(2, 4, guide_start=0.3)),
        (BlockwiseBestOfN({0.4: 1, 1.0: 4}, 3), BlockwiseBestOfN(4, 3, guide_start=0.4)),
    ],
    ids=label,
)
def test_windows_are_special_cases_bit_for_bit(listed, windowed):
    diffusion = GaussianDiffusion(10)
    first, second = (run(diffusion, sampler, value_of(), prompts=["", "1"]) for sampler in (listed, windowed))
    assert torch.equal(first.x, second.x)
    assert first.context.trace.per_image() == second.context.trace.per_image()


def test_every_step_gains_the_largest_of_its_own_number_of_candidates():
    diffusion = GaussianDiffusion(10)
    final = run(diffusion, SVDD(COUNTS), value_of(), 1200)
    mean, _ = diffusion.end_law()
    gains = [diffusion.end(i + 1)[0] * diffusion.std(i) * largest_of(m) for i, m in enumerate(COUNTS) if m > 1]
    assert_mean(rewards(final), mean * sum(B) + sum(gains))


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        (SVDD(COUNTS), 1 + sum(COUNTS[:-1])),
        (SVDD(COUNTS, num_particles=3), 3 * (1 + sum(COUNTS[:-1]))),
        (SVDD({0.3: 4, 1.0: 2}, choose_start=True), 4 + 3 * 4 + 6 * 2),
        (SVDD(COUNTS, guide_every=3), 1 + 1 + 1 + 2 + 1 + 1 + 2 + 1 + 1 + 2 + 0 * 3 - 3),
        (BeamSearch(2, COUNTS), 2 * (1 + sum(COUNTS[:-1]))),
        (BlockwiseBestOfN({0.4: 2, 1.0: 3}, 5), 1 + 2 * 5 + 3 * 4),
    ],
    ids=lambda case: label(case) if isinstance(case, Sampler) else str(case),
)
def test_the_cost_is_the_sum_over_steps(sampler, rows):
    diffusion = GaussianDiffusion(10)
    ledger = run(diffusion, sampler, value_of(), 3).context.ledger
    assert ledger.denoiser_rows == sum(diffusion.denoised_rows) == 3 * rows
    assert count(sampler, GaussianDiffusion(10), value_of()).rows == rows


@pytest.mark.parametrize("counts", [COUNTS, {0.3: 4, 1.0: 32}])
@pytest.mark.parametrize("budget", [11, 40, 97, 400])
def test_a_budget_scales_a_schedule(counts, budget):
    fitted = fit_budget(SVDD(counts), budget, GaussianDiffusion(10), value_of())
    chosen = current_count(fitted)["num_candidates"]
    assert count(fitted, GaussianDiffusion(10), value_of()).rows <= budget
    more = next(each for s in range(1, 10**4) if sum((each := scaled(counts, s, 10))[:-1]) > sum(chosen[:-1]))
    assert 1 + sum(more[:-1]) > budget
    if budget == 400:  # proportions are kept up to rounding
        given = expand(counts, 10)
        assert all(abs(c / sum(chosen) - g / sum(given)) < 1 / sum(chosen) for c, g in zip(chosen, given, strict=True))


@pytest.mark.parametrize("budget", [20, 400])
def test_a_budget_scales_a_schedule_with_most_candidates_in_the_last_step_which_costs_no_rows(budget):
    fitted = fit_budget(SVDD({0.9: 1, 1.0: 200}), budget, GaussianDiffusion(10), value_of())
    *chosen, last = current_count(fitted)["num_candidates"]
    m = (budget - 1) // 9
    assert chosen == [m] * 9
    assert 200 * (m - 0.5) <= last <= 200 * (m + 0.5) + 1
    with pytest.raises(UserError, match="it does not change the cost of 10 denoiser rows"):
        fit_budget(SVDD([4] * 9 + [9000], guide_start=0.9), budget, GaussianDiffusion(10), value_of())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({0.3: 4, 0.9: 32}, r"must rise from above 0 to 1, as in \{0.3: 4, 1.0: 32\}, got \[0.3, 0.9\]"),
        ({0.5: 4, 0.3: 2, 1.0: 32}, r"must rise .* got \[0.5, 0.3, 1.0\]"),
        ({0.0: 4, 1.0: 32}, r"must rise .* got \[0.0, 1.0\]"),
        ({}, r"must rise .* got \[\]"),
        ([], "num_candidates must have one count per step, got an empty list"),
        ([2, 0, 3], "num_candidates must be >= 1, got 0"),
        ([2, True], r"num_candidates must be an integer >= 1, got True \(bool\)"),
        ([2, [4]], r"num_candidates must be an integer >= 1, got \[4\] \(list\)"),
        ({1.0: "many"}, r"num_candidates must be an integer >= 1, got 'many' \(str\)"),
        ({0.5: 2.0, 1.0: 3}, r"num_candidates must be an integer >= 1, got 2.0 \(float\)"),
        ({None: 2}, r"expected fractions of the chain as keys, got \[None\]"),
        *(
            (given, rf"an integer, a list .* or a dict .*, got .* \({type(given).__name__}\)")
            for given in (8.0, 2.5, (4, 2), True, None, "4")
        ),
    ],
)
@pytest.mark.parametrize("sampler", [SVDD, BlockwiseBestOfN, lambda counts: BeamSearch(2, counts)])
def test_impossible_schedules_are_refused(sampler, counts, message):
    with pytest.raises(ValueError, match=message):
        sampler(counts)


@pytest.mark.parametrize("sampler", [SVDD, BlockwiseBestOfN, lambda counts: BeamSearch(2, counts)])
def test_a_schedule_must_fit_the_chain(sampler):
    with pytest.raises(UserError, match=r"num_candidates has 10 counts, one per step, and the chain has num_inf.*=4; "):
        sampler(COUNTS).check(GaussianDiffusion(4), value_of())
    with pytest.raises(UserError, match="needs a chain with noise"):
        sampler(4).check(GaussianDiffusion(4, eta=0.0), value_of())
    with pytest.raises(UserError, match=r"num_candidates is 1, which leaves no choice, .* 0 to 2 of 0 to 3; set"):
        sampler([1, 1, 1, 5]).check(GaussianDiffusion(4, last=1.0), value_of())  # the last step has no noise
    with pytest.raises(ValueError, match="score_parent needs num_candidates < num_particles"):
        SVDD([1, 4], num_particles=4, score_parent=True)


def test_the_command_line_and_a_recorded_configuration_give_schedules(sd15, tmp_path, capsys):
    words = ["predict", "--model.reward", "Compressibility", "--model.diffusion.pretrained", sd15]
    words += ["--model.diffusion.num_inference_steps", "3", "--data.prompts", "[apple]", "--trainer.accelerator", "cpu"]
    schedule = ["--model.sampler.num_candidates", "{0.5: 2, 1.0: 3}", "--output", str(tmp_path / "a")]
    assert main([*words, *schedule]) == 0
    trace = json.loads((tmp_path / "a" / "trace.jsonl").read_text())
    assert trace["candidates"] == [2, 2, 3]
    assert main(["predict", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    for given, message in {
        "[2, 3]": "num_candidates has 2 counts, one per step",
        "many": "expected int, list or dict, got many",
        "{x: 2}": "expected fractions of the chain as keys, got ['x']",
    }.items():
        assert main([*words, "--model.sampler.num_candidates", given, "--output", str(tmp_path / "b")]) == 2
        assert message in capsys.readouterr().err


def test_a_model_states_the_schedule_that_a_budget_chose():
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(10), SVDD({0.5: 1, 1.0: 3}), value_of(), budget=100)
    counts = model.sampler.num_candidates
    assert model.chosen == {"num_candidates": counts, "denoiser_rows": 1 + sum(counts[:-1])}
    assert math.isclose(counts[-1] / counts[0], 3, rel_tol=0.1)
