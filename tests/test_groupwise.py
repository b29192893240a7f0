"""Groupwise rewards: a call holds one group, whatever the batch and the chunk size; `WinRate` against brute force."""

import json
import math

import pytest
import torch
from PIL import Image

from svdd import UserError
from svdd.__main__ import main
from svdd.diffusion.chunking import Chunker
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.function import FunctionReward
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.win_rate import WinRate
from svdd.rewards.z_scored import ZScored
from svdd.runs.rows import Prompt
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.dps import DPS
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.latent_conv import LatentConvValue
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened
from svdd.values.training.calibration import Calibration
from tests.analytic import GaussianDiffusion, Linear, bound, run

LINEAR = [1.0, -0.5]


class Watched(Reward):
    """The distance to the mean of the call; keeps the prompts of each call."""

    groupwise = True

    def __init__(self):
        super().__init__()
        self.calls: list[list[str]] = []

    def forward(self, images, prompts):
        self.calls.append(list(prompts))
        return (images - images.mean(0)).flatten(1).norm(dim=1)


def chain(chunk_size="auto", reproducible=False, steps=4):
    diffusion = GaussianDiffusion(steps)
    diffusion.chunker = Chunker(chunk_size, reproducible)
    return diffusion


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("chunk_size", ["auto", 1, 4])
@pytest.mark.parametrize(
    ("sampler", "sizes"),
    [
        (SVDD(3), [3] * 4),
        (SVDD(25, alpha=0.3), [25] * 4),  # more than the reproducible mode computes at once
        (BeamSearch(2, 3), [6] * 4),
        (BestOfN(5), [5]),
    ],
    ids=["svdd", "many", "beams", "best"],
)
def test_a_call_holds_one_images_rows_whatever_the_batch(sampler, sizes, chunk_size, reproducible):
    reward, prompts = Watched(), ["0", "1", "2"]
    together = run(chain(chunk_size, reproducible), sampler, bound(PosteriorMean(), reward), prompts=prompts)
    assert sorted(map(len, reward.calls)) == sorted(sizes * 3)
    assert all(len(set(call)) == 1 for call in reward.calls)
    for k, prompt in enumerate(prompts):
        alone = run(chain(), sampler, bound(PosteriorMean(), Watched()), prompts=[prompt], seeds=[k])
        assert torch.equal(alone.x[0], together.x[k])


def test_a_group_in_results_is_the_images_of_a_prompt(sd15):
    reward = WinRate(Brightness())
    model = GuidedDiffusion(reward, StableDiffusion(sd15, 2), Unguided(), images_per_prompt=3)
    batch = [Prompt(p, text, None, None, {}) for p, text in enumerate("aba")]  # a repeated text is a group of its own
    prediction = model.predict(batch)
    images, scores = model.sample(["a", "b", "a"], num_images=3)
    assert torch.equal(images, prediction.images)
    expected = torch.cat([reward.score(part, ["a"] * 3) for part in images.split(3)])
    assert torch.equal(scores, expected)
    assert sorted(scores[:3].tolist()) == sorted(scores[3:6].tolist()) == [0, 0.5, 1]
    assert [row["rewards"][reward.name] for row in prediction.rows] == scores.tolist()
    assert model.sample("a")[1].tolist() == [0.5]
    assert reward.name == "WinRate-Brightness"


def test_a_score_is_not_kept_for_another_group():
    reward, model = WinRate(Linear(LINEAR)), GuidedDiffusion(WinRate(Linear(LINEAR)), chain(), BestOfN(5))
    final = model.draw(["0", "1"], [1, 2])
    assert final.scores(reward).tolist() == [0.5, 0.5]
    assert model.value(final).tolist() == [0.5, 0.5]


# ---- WinRate


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_win_rate_is_the_mean_over_all_pairs(temperature, count):
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count)).double()
    images[-1] = images[0]  # a draw
    scores = Brightness().score(images, [""] * count).tolist()

    def beats(a, b):
        if temperature:
            return 1 / (1 + math.exp(-(a - b) / temperature))
        return 0.5 if a == b else float(a > b)

    expected = [
        sum(beats(a, b) for k, b in enumerate(scores) if k != j) / (count - 1) if count > 1 else 0.5
        for j, a in enumerate(scores)
    ]
    found = WinRate(Brightness(), temperature).score(images, [""] * count)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    darkness = FunctionReward(lambda images, prompts: -Brightness()(images, prompts), higher_is_better=False)
    torch.testing.assert_close(WinRate(darkness, temperature).score(images, [""] * count), found)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    permuted = WinRate(Brightness(), temperature).score(images[order], [""] * count)
    torch.testing.assert_close(permuted, found[order])


@pytest.mark.parametrize(
    "sampler",
    [
        SVDD(4),
        SVDD(4, num_particles=3, choose_start=True),
        BestOfN(6),
        RandomSearch(4),
        BlockwiseBestOfN(4, 2),
        ProgressivePruning(4),
    ],
    ids=["svdd", "beams", "best", "random", "blocks", "pruning"],
)
@pytest.mark.parametrize(
    "value",
    [PosteriorMean, lambda: Lookahead(1), lambda: Screened(PosteriorMean(), Lookahead(1), keep=3)],
    ids=["posterior mean", "lookahead", "screened"],
)
def test_ranks_guide_as_the_reward_does(sampler, value):
    """Taking the best needs no more than ranks, so both rewards draw the same images."""
    if value().keep is not None and isinstance(sampler, ProgressivePruning):
        pytest.skip("this sampler needs every value")
    prompts, found = ["0", "1", "0"], []
    for reward in (Linear(LINEAR), WinRate(Linear(LINEAR)), WinRate(Linear(LINEAR), 0.5)):
        found.append(GuidedDiffusion(reward, chain(), sampler, value()).draw(prompts, [1, 2, 3]).x)
    plain = GuidedDiffusion(Linear(LINEAR), chain(), Unguided()).draw(prompts, [1, 2, 3]).x
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert not torch.equal(found[0], plain)


def test_a_sum_of_win_rates_elects_the_winner_of_all_pairs():
    """Best of 6 by two rewards of very different scale, against an election by hand among the same 6 ends."""
    first, second, n = Linear([1.0, 0.0]), Linear([-300.0, 1000.0]), 6
    prompts, seeds = [""] * 20, list(range(20))
    rule = WeightedSum([WinRate(first), WinRate(second)], [1.0, 0.9])  # 0.9: hardly a tie
    chosen = GuidedDiffusion(rule, chain(), BestOfN(n)).draw(prompts, seeds).x
    by_sum = GuidedDiffusion(WeightedSum([first, second]), chain(), BestOfN(n)).draw(prompts, seeds).x
    ends = Sampler.finish(Start(chain(), prompts, seeds)(n)).x.unflatten(0, (20, n))
    for k, group in enumerate(ends):
        columns = [reward.score(chain().decode(group), [""] * n).tolist() for reward in (first, second)]
        wins = [[sum(a > b for b in column) for a in column] for column in columns]
        votes = [one + 0.9 * other for one, other in zip(*wins, strict=True)]
        assert torch.equal(chosen[k], group[max(range(n), key=votes.__getitem__)])
    assert not torch.equal(chosen, by_sum)


# ---- parts, and what cannot work


def test_a_part_that_is_groupwise_makes_the_whole_groupwise():
    part = WinRate(Brightness())
    for whole in (WeightedSum([Brightness(), part]), ZScored(part, 0.5, 0.3), Threshold(part, at_least=0.2)):
        assert whole.groupwise
        assert not whole.differentiable
    assert not WeightedSum([Brightness(), CLIPScore()]).groupwise


@pytest.mark.parametrize(
    "sampler",
    [
        SMC(4),
        SVDD(4, alpha=0.1, num_particles=2),
        ZeroOrderSearch(),
        RolloverBudget(4),
        Refinement(sampler=SVDD(2)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_that_compare_several_calls_are_refused(sampler):
    with pytest.raises(UserError, match=f"{type(sampler).__name__} .*WinRate-Linear scores an image relative to"):
        GuidedDiffusion(WinRate(Linear(LINEAR)), chain(), sampler)
    GuidedDiffusion(Linear(LINEAR), chain(), sampler, eval_rewards=[WinRate(Linear(LINEAR))])


def test_what_needs_the_reward_of_one_image_is_refused(sd15):
    reward = WinRate(Brightness())
    with pytest.raises(UserError, match="LatentConvValue needs the reward of a single rollout, and WinRate-Brightness"):
        GuidedDiffusion(reward, StableDiffusion(sd15, 2), SVDD(2), LatentConvValue())
    with pytest.raises(UserError, match="svdd calibrate needs the reward of a single rollout"):
        Calibration(reward, StableDiffusion(sd15, 2))
    with pytest.raises(UserError, match="DPS needs gradients"):
        GuidedDiffusion(WinRate(Linear(LINEAR)), chain(), DPS())
    wrong = Watched()
    wrong.differentiable = True
    with pytest.raises(UserError, match="Watched is groupwise, so an image has no gradient of its own"):
        GuidedDiffusion(wrong, chain(), SVDD(2))
    for temperature in (-1.0, math.nan, "low"):
        with pytest.raises(ValueError, match="temperature must be"):
            WinRate(Brightness(), temperature)


def test_svdd_score_compares_the_pictures_of_a_prompt(tmp_path, capsys):
    levels = [30, 200, 90, 120, 60]
    for k, level in enumerate(levels):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{k}.png")
    (tmp_path / "prompts.txt").write_text("a\nb\na\nb\na\n")
    words = ["score", "--reward", "WinRate", "--reward.reward", "Brightness", "--eval_rewards+=Brightness"]
    words += ["--images", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--batch_size", "2"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["rewards"]["WinRate-Brightness"] for row in rows] == [0, 1, 1, 0, 0.5]
    assert [row["rewards"]["Brightness"] for row in rows] == pytest.approx([level / 255 for level in levels], abs=1e-5)
    Image.new("RGB", (8, 9)).save(tmp_path / "4.png")
    assert main(words) == 2
    assert "the 3 pictures of 'a' cannot be compared at once: they differ in size" in capsys.readouterr().err
