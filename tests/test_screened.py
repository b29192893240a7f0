"""Screening: its law in closed form, its limits bit for bit, its exact cost, and what refuses it."""

import json
import math
from statistics import NormalDist

import pytest
import torch

from svdd import UserError
from svdd.__main__ import main
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.evaluation.selections import idle
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import count
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.dps import DPS
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened
from tests.analytic import GaussianDiffusion, Linear, bound, run
from tests.test_samplers import B, assert_mean, label, largest_of, value_of

EXACT, ACROSS = torch.tensor([B, [0.8, 0.6]], dtype=torch.float64)


class Along(Value):
    """A linear value b . x of the noisy latent, which costs no denoiser row."""

    most_rows = 0

    def __init__(self, b):
        super().__init__()
        self.b = torch.as_tensor(b, dtype=torch.float64)

    def estimate(self, state):
        return state.x.flatten(1) @ self.b


def screened(cheap: Value, exact: Value, keep: int, start: float = 0.0) -> Value:
    return bound(Screened(cheap, exact, keep, start), Linear(B))


# ---- the law


@pytest.mark.parametrize("cosine", [0.6, 0.0, -0.6])
def test_the_law_at_a_temperature_is_restricted_to_the_best_share_by_the_cheap_value(cosine):
    """The step's noise z follows N(0, I) exp(t z . b) where z . u exceeds q, the quantile of the screened share.

    With c = u . b: E[z . b] = t + c h(q - t c), and E[z . a] = s h(q - t c) across, with the normal hazard h.
    """
    diffusion, alpha, m, keep = GaussianDiffusion(2), 0.8, 240, 60
    sine, normal = math.sqrt(1 - cosine**2), NormalDist()
    value = screened(Along(cosine * EXACT + sine * ACROSS), Along(EXACT), keep)
    final = run(diffusion, SVDD(m, alpha, guide_stop=0.5), value, 1500).x.flatten(1)  # selects at i = 1 only
    gain, offset, _ = diffusion.end(1)
    std, tilt, quantile = diffusion.std(0), diffusion.std(0) / alpha, normal.inv_cdf(1 - keep / m)
    excess = quantile - tilt * cosine
    hazard = normal.pdf(excess) / (1 - normal.cdf(excess))
    plain = gain * diffusion.affine(0)[1] + offset
    along, across = tilt + cosine * hazard, sine * hazard
    assert_mean(final @ EXACT, plain * float(EXACT.sum()) + gain * std * along, slack=0.03 * std)
    assert_mean(final @ ACROSS, plain * float(ACROSS.sum()) + gain * std * across, slack=0.03 * std)


def test_the_best_of_the_kept_is_taken_at_zero_temperature():
    """With values that are independent, the K kept are K independent candidates for the exact value."""
    diffusion, m, keep = GaussianDiffusion(2), 12, 4
    final = run(diffusion, SVDD(m, guide_stop=0.5), screened(Along(ACROSS), Along(EXACT), keep), 1500).x.flatten(1)
    gain, offset, _ = diffusion.end(1)
    plain, std = gain * diffusion.affine(0)[1] + offset, diffusion.std(0)
    assert_mean(final @ EXACT, plain * float(EXACT.sum()) + gain * std * largest_of(keep))
    screened_in = sum(largest_of_rank(m, rank) for rank in range(keep)) / keep
    assert_mean(final @ ACROSS, plain * float(ACROSS.sum()) + gain * std * screened_in)


def largest_of_rank(m: int, rank: int) -> float:
    """Returns the expected (rank + 1)-th largest of m standard normal numbers, by quadrature."""
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    below = torch.special.ndtr(z)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * below ** (m - 1 - rank) * (1 - below) ** rank
    return float((z * density).sum() * (z[1] - z[0]) * math.comb(m - 1, rank) * m)


SAMPLERS = [
    SVDD(6),
    SVDD(6, alpha=0.7),
    SVDD(5, alpha=0.7, num_particles=2, choose_start=True),
    SVDD(4, alpha=math.inf),
    SVDD(5, "auto"),
    SVDD(2, num_particles=3, score_parent=True),
    BeamSearch(2, 4),
    BlockwiseBestOfN(6, 2, alpha=0.7, choose_start=True),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_keeping_all_candidates_is_the_exact_value_bit_for_bit(sampler):
    diffusion, cheap = GaussianDiffusion(4), Along(ACROSS)
    exact = run(diffusion, sampler, value_of(), prompts=["", "1"])
    everything = run(diffusion, sampler, screened(cheap, PosteriorMean(), 99), prompts=["", "1"])
    assert torch.equal(everything.x, exact.x)
    assert everything.context.trace.per_image() == exact.context.trace.per_image()


@pytest.mark.parametrize("sampler", [SVDD(6), BlockwiseBestOfN(6, 2)], ids=label)
def test_keeping_one_follows_the_cheap_value_bit_for_bit(sampler):
    diffusion, cheap = GaussianDiffusion(4), Along(ACROSS)
    first = run(diffusion, sampler, screened(cheap, PosteriorMean(), 1), prompts=["", "1"])
    assert torch.equal(first.x, run(diffusion, sampler, bound(cheap, Linear(B)), prompts=["", "1"]).x)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_the_trace_is_finite_and_an_image_does_not_depend_on_its_neighbours(sampler):
    diffusion, value = GaussianDiffusion(4), screened(Along(ACROSS), PosteriorMean(), 3)
    sampler.check(diffusion, value)
    together = run(diffusion, sampler, value, prompts=["", "1", "-2"], seeds=[4, 0, 9])
    traces = together.context.trace.per_image(lineage=True)
    numbers = [{name: column for name, column in trace.items() if name != "alpha"} for trace in traces]
    json.dumps(numbers, allow_nan=False)
    assert all(trace["step"][-1] == 4 for trace in traces)
    assert all(
        low <= high for trace in traces for low, high in zip(trace["value_mean"], trace["value_max"], strict=True)
    )
    for k, (prompt, seed) in enumerate(zip(["", "1", "-2"], [4, 0, 9], strict=True)):
        alone = run(diffusion, sampler, value, prompts=[prompt], seeds=[seed])
        assert torch.equal(alone.x, together.x[k : k + 1])
        assert alone.context.trace.per_image(lineage=True) == traces[k : k + 1]


@pytest.mark.parametrize("sampler", [SVDD(5), SVDD(5, "auto"), SVDD(3, num_particles=3), BeamSearch(3, 2)], ids=label)
def test_what_the_cheap_value_alone_decides_counts_as_a_choice(sampler):
    value = Screened(Along(ACROSS), PosteriorMean(), sampler.num_kept)
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(4), sampler, value)
    for found in model.draw([""] * 3, range(3)).context.trace.statistics(3):
        assert (found["choices"], found["resamplings"]) == (4, 3)
        assert idle(model.sampler, {**found, "alpha": {"mean": found.get("alpha")}}) == ""


@pytest.mark.parametrize("keep", [3, 6])
def test_equal_weights_have_the_whole_effective_sample_size_of_the_kept(keep):
    final = run(GaussianDiffusion(4), SVDD(6, math.inf), screened(Along(ACROSS), PosteriorMean(), keep), 3)
    assert [found["ess"] for found in final.context.trace.statistics(3)] == [1.0] * 3


# ---- the cost


@pytest.mark.parametrize("cheap", ["free", "rows"])
@pytest.mark.parametrize(("m", "b", "keep"), [(6, 1, 2), (6, 1, 6), (3, 2, 4), (1, 1, 2)])
def test_the_cost_is_that_of_the_kept_rows_and_nothing_is_computed_twice(m, b, keep, cheap):
    """A cheap value that reads x0 makes every prediction, which the exact one then reuses."""
    steps, diffusion = 8, GaussianDiffusion(8)
    value = screened(Along(ACROSS) if cheap == "free" else PosteriorMean(), PosteriorMean(), keep)
    scored = min(keep, b * m) if cheap == "free" else b * m
    expected = b + scored * (steps - 1) if m > 1 else steps
    final = run(diffusion, SVDD(m, num_particles=b), value, 3)
    ledger = final.context.ledger
    assert ledger.denoiser_rows == sum(diffusion.denoised_rows) == 3 * expected
    assert count(SVDD(m, num_particles=b), GaussianDiffusion(8), value).denoiser_rows == expected
    _ = final.images
    decoded = min(keep, b * m) if cheap == "free" else b * m
    assert ledger.decoded_images == 3 * (decoded * (steps - 1) + b * m if m > 1 else 1)


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"reuse_guidance": True}, {"feature_depth": 2}], ids=str)
def test_a_preview_screens_and_only_kept_rows_cost_the_whole_network(sd15, settings):
    steps, m, keep = 4, 5, 2
    value = Screened(PosteriorMean(**settings), PosteriorMean(), keep)
    model = GuidedDiffusion(Compressibility(), StableDiffusion(sd15, steps), SVDD(m), value)
    ledger = model.draw(["panda", "car"], [0, 1]).context.ledger
    assert ledger.denoiser_rows == 2 * (1 + (m + keep) * (steps - 1))
    share = model.diffusion.preview_rows(value.preview or value.cheap.preview, 1)
    assert ledger.network_rows == pytest.approx(2 * (2 + (share * m + 2 * keep) * (steps - 1)))
    cost = count(SVDD(m), model.diffusion, value)
    assert (2 * cost.denoiser_rows, 4 * cost.network_rows) == pytest.approx((ledger.denoiser_rows, ledger.network_rows))


def test_two_decoders_share_a_preview():
    """The kept row alone passes the whole network, and the exact value decodes the best rows' previews."""
    steps, m, keep, settings = 4, 5, 2, {"feature_depth": 2, "reuse_guidance": True}
    value = Screened(PosteriorMean("tiny", **settings), PosteriorMean(**settings), keep)
    model = GuidedDiffusion(Compressibility(), StableDiffusion("emoji", steps), SVDD(m), value)
    ledger = model.draw(["panda", "car"], [0, 1]).context.ledger
    share = model.diffusion.preview_rows(value.preview, 1)
    assert ledger.network_rows == pytest.approx(2 * (2 * steps + share * m * (steps - 1)))
    assert ledger.decoded_images == 2 * ((m + keep) * (steps - 1) + m)  # the reward itself chooses the last image
    assert 2 * count(SVDD(m), model.diffusion, value).network_rows == pytest.approx(ledger.network_rows / 2)


def test_early_steps_are_not_screened():
    """Up to `start` the selections and the cost are those of the exact value, after it those of screening."""
    m, keep, diffusion = 6, 2, GaussianDiffusion(8)
    sampler, value = SVDD(m), screened(Along(ACROSS), PosteriorMean(), keep, start=0.5)
    final = run(diffusion, sampler, value, 3)
    exact, always = (
        run(diffusion, sampler, each, 3)
        for each in (bound(PosteriorMean(), Linear(B)), screened(Along(ACROSS), PosteriorMean(), keep))
    )
    chosen, first, last = (each.context.trace.selections for each in (final, exact, always))
    for k in range(4):  # of the steps that leave 0 .. 3
        torch.testing.assert_close(chosen[k].values, first[k].values)
    assert [bool(each.values.isnan().any()) for each in chosen] == [False] * 4 + [True] * 3 + [False]
    assert all(each.values.isnan().any() for each in last[:7])
    assert final.context.ledger.denoiser_rows == 3 * (1 + 4 * m + 3 * keep)
    assert count(sampler, GaussianDiffusion(8), value).denoiser_rows == 1 + 4 * m + 3 * keep


def test_a_budget_counts_both_values():
    value = Screened(PosteriorMean(), PosteriorMean(), 3)
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(8), SVDD(), value, budget=100)
    assert model.sampler.num_candidates == 14  # 1 + 14 * 7
    free = Screened(Along(ACROSS), PosteriorMean(), 3)
    with pytest.raises(UserError, match="with Screened it does not change the cost of 22 denoiser rows"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(8), SVDD(), free, budget=100)


# ---- what is refused


@pytest.mark.parametrize("sampler", [SMC(), TwistedSMC(), DPS(), ProgressivePruning(), RolloverBudget()], ids=label)
def test_samplers_that_need_every_value_refuse_it(sampler):
    name = type(sampler).__name__
    message = (
        f"{name} needs (the value of every row, and Screened leaves rows out|gradients, and value Screened is not)"
    )
    with pytest.raises(UserError, match=message):
        GuidedDiffusion(Linear(B), GaussianDiffusion(4), sampler, Screened(Along(B), PosteriorMean()))


@pytest.mark.parametrize("sampler", [SVDD(4, num_particles=4), SVDD(4, 0.5, 4), BeamSearch(4, 2)], ids=label)
def test_more_rows_than_are_scored_cannot_be_kept(sampler):
    with pytest.raises(UserError, match=r"keeps 4 rows of an image, and Screened scores only keep=3; set keep to 4"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(4), sampler, Screened(Along(B), PosteriorMean()))


@pytest.mark.parametrize(
    "sampler", [BestOfN(3), Unguided(), EvolutionarySearch(1, num_elites=2), CrossEntropySearch(1)], ids=label
)
def test_samplers_that_select_finished_images_only_take_it(sampler):
    value = Screened(Along(B), PosteriorMean(), 1)
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(4), sampler, value)
    assert torch.equal(model.draw(["", ""], [0, 1]).x, run(GaussianDiffusion(4), sampler, value_of(), 2).x)


def test_impossible_screening_is_refused():
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Screened(PosteriorMean(), PosteriorMean(), 0)
    with pytest.raises(ValueError, match="cheap and exact reuse the parent's evaluation differently: Preview"):
        Screened(PosteriorMean(feature_depth=1), PosteriorMean(reuse_guidance=True))
    with pytest.raises(ValueError, match="cheap: a Screened value cannot be part of another"):
        Screened(Screened(PosteriorMean(), PosteriorMean()), PosteriorMean())


# ---- the command


def test_the_command_line_builds_both_values_and_a_run_resumes(sd15, tmp_path, capsys):
    words = ["predict", "--model.reward", "Compressibility", "--model.diffusion.pretrained", sd15]
    words += [
        "--model.diffusion.num_inference_steps",
        "3",
        "--model.sampler.num_candidates",
        "4",
        "--model.budget",
        "20",
    ]
    words += ["--model.value", "Screened", "--model.value.cheap", "PosteriorMean"]
    words += ["--model.value.cheap.guidance_scale", "1", "--model.value.exact", "PosteriorMean"]
    words += ["--data.prompts", "[apple]", "--trainer.accelerator", "cpu", "--output", str(tmp_path)]
    assert main([*words, "--model.value.keep", "2"]) == 0
    trace = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])
    assert len(trace["step"]) == 3
    capsys.readouterr()
    assert main([*words, "--model.value.keep", "3"]) == 2
    assert "model.value.keep was 2, now 3" in capsys.readouterr().err
