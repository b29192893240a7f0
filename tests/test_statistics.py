"""Intervals, diversity, distances, path divergence, and the check for over-optimisation."""

import json
import math
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svdd import UserError
from svdd.evaluation.baseline import against, independent, over_optimised, paired, verdict
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.metrics import CMMD, Diversity, RewardStatistics
from svdd.evaluation.metrics.intervals import clustered as in_clusters
from svdd.evaluation.metrics.intervals import spread_within, standard_error, t_probability, t_quantile
from svdd.evaluation.sign_flips import p_value
from svdd.runs.pictures import find_pictures, read_pictures
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.dps import DPS
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.refinement import Refinement
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.toolbox.selection import choice_kl
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, bound

# ---- intervals


def clustered(seed: int, prompts: int = 40, images: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scores of mean 0, with 0.7 of the variance between prompts."""
    generator = torch.Generator().manual_seed(seed)
    between = torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    within = torch.randn(prompts, images, generator=generator, dtype=torch.float64)
    scores = 0.7**0.5 * between + 0.3**0.5 * within
    return scores.flatten(), torch.arange(prompts).repeat_interleave(images)


def interval(scores: torch.Tensor, prompts: torch.Tensor | None) -> tuple[float, float]:
    statistics = RewardStatistics()
    statistics.update(scores, prompts)
    result = statistics.compute()
    return result["ci95_low"].item(), result["ci95_high"].item()


@pytest.mark.parametrize("prompts", [5, 40])
def test_the_interval_covers_the_mean_of_correlated_images(prompts):
    """Coverage of 200 data sets: 95 % with clusters (four standard errors are 12 data sets), at most 75 % without."""
    covered = {True: 0, False: 0}
    for seed in range(200):
        scores, indices = clustered(seed, prompts)
        for by_prompt in covered:
            low, high = interval(scores, indices if by_prompt else None)
            covered[by_prompt] += low <= 0 <= high
    assert 0.89 * 200 <= covered[True] <= 200
    assert covered[False] < 0.75 * 200


def test_the_interval_is_the_normal_one_for_many_prompts():
    scores = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(scores, None)
    error = float(scores.std()) / math.sqrt(4000)
    assert (low, high) == pytest.approx(
        (float(scores.mean()) - 1.96 * error, float(scores.mean()) + 1.96 * error), abs=0.15 * error
    )


def test_the_interval_does_not_depend_on_order_or_batches():
    scores, prompts = clustered(3)
    one, other = RewardStatistics(), RewardStatistics()
    one.update(scores, prompts)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    for part in order.split(7):
        other.update(scores[part], prompts[part])
    assert one.compute() == other.compute()


def test_the_standard_error_is_that_of_the_prompts():
    scores, prompts = clustered(0, 12, 4)
    statistics = RewardStatistics()
    statistics.update(scores, prompts)
    means = scores.view(12, 4).mean(1)
    assert float(statistics.compute()["standard_error"]) == pytest.approx(float(means.std()) / 12**0.5, rel=1e-12)


def test_uneven_prompts_weigh_by_their_images():
    """Mean 2; the prompts' rests sum to -3, 0 and 3, so SE^2 = 3 / 2 * (9 + 0 + 9) / 6^2."""
    pairs = [(1.0, 1.0), (2.0, 1.0), (5.0, 1.0), (1.0, 1.0), (1.0, 1.0), (2.0, 1.0)]
    assert in_clusters(pairs[:4], [7, 2, 7, -1]) == [[pairs[0], pairs[2]], [pairs[1]], [pairs[3]]]
    statistics = RewardStatistics()
    statistics.update(torch.tensor([score for score, _ in pairs]), torch.tensor([0, 1, 2, 0, 0, 1]))
    assert float(statistics.compute()["standard_error"]) == pytest.approx((3 / 2 * 18 / 36) ** 0.5)
    assert math.isnan(standard_error([pairs]))


def test_weights_count_as_repetitions():
    """Particles with shares 3 / 4 and 1 / 4 give the mean and quantiles' limits of three rows and one."""
    scores, prompts = torch.tensor([1.0, 5.0, 2.0, 4.0]), torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([0.75, 0.25, 0.25, 0.75])
    statistics, repeated = RewardStatistics(), RewardStatistics()
    statistics.update(scores, prompts, weights)
    times = (4 * weights).long()
    repeated.update(scores.repeat_interleave(times), prompts.repeat_interleave(times))
    found, expected = statistics.compute(), repeated.compute()
    for name in ("mean", "standard_error", "ci95_low", "ci95_high", "min", "max"):
        assert float(found[name]) == pytest.approx(float(expected[name])), name
    assert found["mean"] == 2.75
    assert found["median"] == 3  # 1, 2, 4 and 5 at the places 0, 0.5, 1 and 1.5
    one = RewardStatistics()
    one.update(scores, prompts, torch.ones(4))
    other = RewardStatistics()
    other.update(scores, prompts)
    assert one.compute() == other.compute()
    with pytest.raises(ValueError, match="one weight >= 0 per score"):
        other.update(scores, prompts, -weights)


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [  # from printed tables
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 3, 3.18245),
        (0.95, 7, 2.36462),
        (0.95, 23, 2.06866),
        (0.95, 120, 1.97993),
        (0.99, 2, 9.92484),
        (0.99, 5, 4.03214),
        (0.975, 4, 3.49541),
    ],
)
def test_students_quantiles_are_those_of_the_tables(level, freedom, quantile):
    assert t_quantile(level, freedom) == pytest.approx(quantile, rel=2e-6)


@pytest.mark.parametrize("freedom", [1, 2, 7, 40])
def test_students_probability_inverts_the_quantile(freedom):
    assert t_probability(-t_quantile(0.99, freedom), freedom) == pytest.approx(0.01, rel=1e-6)


def test_students_quantile_converges_to_the_normal_one():
    assert t_quantile(0.95, 0) == math.inf
    assert t_quantile(0.95, 10**7) == pytest.approx(1.959964, rel=2e-4)


def test_students_interval_by_hand():
    """Mean 2 and standard deviation 1 give the half-width 4.302653 / sqrt(3)."""
    found = paired([1.0, 2.0, 3.0])
    assert found == pytest.approx(
        {
            "difference": 2,
            "standard_error": 3**-0.5,
            "ci95_low": 2 - 4.302653 / 3**0.5,
            "ci95_high": 2 + 4.302653 / 3**0.5,
            "p_value": 0.25,  # 2 of 8 flips
            "prompts": 3,
        },
        rel=1e-6,
    )


def test_intervals_of_several_comparisons_hold_together():
    """Bonferroni: each of 3 has the level 1 - 0.05 / 3, for which Student's quantile with 2 degrees is 7.648878."""
    found, alone = paired([1.0, 2.0, 3.0], comparisons=3), paired([1.0, 2.0, 3.0])
    assert found["ci95_high"] == pytest.approx(2 + 7.648878 / 3**0.5, rel=1e-5)
    assert found["ci95_low"] + found["ci95_high"] == pytest.approx(4)
    assert {k: v for k, v in found.items() if "ci95" not in k} == {k: v for k, v in alone.items() if "ci95" not in k}


def test_the_spread_within_prompts_is_that_of_the_deviations():
    scores, prompts = clustered(0)
    groups = scores.view(40, 5)
    expected = (groups - groups.mean(1, keepdim=True)).square().sum() / (40 * 4)
    pairs = [[(score, 1.0) for score in group] for group in groups.tolist()]
    assert spread_within(pairs) == pytest.approx(float(expected.sqrt()))
    statistics = RewardStatistics()
    statistics.update(scores, prompts)
    assert statistics.compute()["std_within"].item() == pytest.approx(0.3**0.5, rel=0.1)
    assert math.isnan(spread_within([pairs[0][:1], pairs[1][:1]]))


def test_the_best_score_is_the_lowest_if_lower_is_better():
    statistics = RewardStatistics(higher_is_better=False)
    statistics.update(torch.arange(11.0))
    assert statistics.compute()["top10"] == 1
    assert statistics.compute()["top20"] == 2


def test_every_score_needs_its_prompt():
    with pytest.raises(ValueError, match="one prompt per score, got 2 for 3"):
        RewardStatistics().update(torch.zeros(3), torch.zeros(2))


# ---- diversity and distances


def test_diversity_is_that_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=1)
    prompts = torch.arange(30) % 10
    diversity = Diversity()
    for part in torch.randperm(30, generator=generator).split(8):
        diversity.update(3 * features[part], prompts[part])  # norms do not matter
    found = {name: value.item() for name, value in diversity.compute().items()}

    def by_hand(rows: torch.Tensor) -> tuple[float, float]:
        kernel = (rows @ rows.T).double().numpy()
        n = len(kernel)
        distances = 1 - kernel[np.triu_indices(n, 1)]
        weights = np.linalg.eigvalsh(kernel / n)
        weights = weights[weights > 1e-12]
        return distances.mean(), math.exp(-(weights * np.log(weights)).sum())

    assert (found["pairwise"], found["vendi"]) == pytest.approx(by_hand(features), rel=1e-5)
    within = np.mean([by_hand(features[prompts == p]) for p in range(10)], axis=0)
    assert (found["pairwise_within"], found["vendi_within"]) == pytest.approx(tuple(within), rel=1e-5)


def test_diversity_weighs_particles():
    """The Vendi score is that of repeated pictures; pairs of different pictures count by the product of weights."""
    features = torch.nn.functional.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    weights, prompts = torch.tensor([0.5, 0.25, 0.25]), torch.zeros(3, dtype=torch.int64)
    diversity, repeated = Diversity(), Diversity()
    diversity.update(features, prompts, weights)
    times = (4 * weights).long()
    repeated.update(features.repeat_interleave(times, 0), prompts.repeat_interleave(times))
    found = diversity.compute()
    assert float(found["vendi"]) == pytest.approx(float(repeated.compute()["vendi"]), rel=1e-5)
    pairs = [(j, k) for j in range(3) for k in range(j)]
    distances = [float(1 - features[j] @ features[k]) for j, k in pairs]
    by_hand = np.average(distances, weights=[float(weights[j] * weights[k]) for j, k in pairs])
    assert float(found["pairwise_within"]) == pytest.approx(by_hand, rel=1e-5)
    diversity.reset()
    diversity.update(features, prompts, torch.tensor([1.0, 0.0, 0.0]))  # one particle has all weight
    assert diversity.compute()["vendi"] == pytest.approx(1)


def test_diversity_of_too_few_images_is_nan():
    diversity = Diversity()
    diversity.update(torch.ones(1, 4), torch.tensor([0]))
    found = diversity.compute()
    assert found["vendi"] == pytest.approx(1)
    assert all(math.isnan(found[name]) for name in ("pairwise", "pairwise_within", "vendi_within"))
    with pytest.raises(ValueError, match=r"got \[2, 4\] and \[3\]"):
        diversity.update(torch.ones(2, 4), torch.zeros(3))


def test_cmmd_equals_its_formula_and_grows_with_distance():
    generator = torch.Generator().manual_seed(0)
    real, near = (torch.nn.functional.normalize(torch.randn(20, 5, generator=generator), dim=1) for _ in range(2))
    far = torch.nn.functional.normalize(near + 3, dim=1)

    def cmmd(one: torch.Tensor, other: torch.Tensor) -> float:
        metric = CMMD()
        metric.update(one, real=True)
        for part in other.split(6):
            metric.update(part, real=False)
        return metric.compute().item()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * 10**2)).mean().item()

    assert cmmd(real, near) == pytest.approx(
        1000 * (kernel(real, real) + kernel(near, near) - 2 * kernel(real, near)), rel=1e-6
    )
    assert cmmd(real, far) > 5 * cmmd(real, near) > 0
    weighted, repeated, weights = CMMD(), CMMD(), torch.arange(20) % 3
    weighted.update(real, real=True, weights=weights / 3)
    repeated.update(real.repeat_interleave(weights, 0), real=True)
    for metric in (weighted, repeated):
        metric.update(far, real=False)
    assert float(weighted.compute()) == pytest.approx(float(repeated.compute()), rel=1e-9)


# ---- divergence of the paths


def test_the_divergence_of_a_selection_matches_its_law():
    """For best of n of a uniform law, KL equals the numerical integral of n u^(n-1) log(n u^(n-1))."""
    u = np.linspace(0, 1, 200_001)[1:]
    for n in (1, 2, 8, 20):
        density = n * u ** (n - 1)
        exact = float(torch.trapezoid(torch.tensor(density * np.log(density)), torch.tensor(u))) if n > 1 else 0.0
        assert float(choice_kl(torch.zeros(1, n), 0)) == pytest.approx(exact, abs=1e-3)
    values = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    p = (values.double() / 0.5).softmax(1)
    torch.testing.assert_close(choice_kl(values, 0.5), math.log(3) + (p * p.log()).sum(1))
    assert float(choice_kl(values, 0.5)[1]) == pytest.approx(0, abs=1e-12)


def drawn(sampler, num_steps: int = 6) -> torch.Tensor | float | None:
    value, chain = bound(PosteriorMean(), Linear([1.0, 0.5])), GaussianDiffusion(num_steps)
    return sampler(Start(chain, ["0"] * 3, range(3)), value).context.trace.path_kl


def test_the_trace_holds_the_divergence_of_a_sampler():
    best = [math.log(n) - (n - 1) / n for n in (4, 8)]
    assert drawn(Unguided()) == 0
    assert drawn(SVDD(1)) == 0
    assert drawn(BestOfN(8)).tolist() == pytest.approx([best[1]] * 3)
    assert drawn(RandomSearch(8)).tolist() == pytest.approx([best[1]] * 3)
    guided = sum(GaussianDiffusion(6).std(i) > 0 for i in range(6))
    assert drawn(SVDD(4)).tolist() == pytest.approx([guided * best[0]] * 3)
    assert drawn(BlockwiseBestOfN(4, block_size=3)).tolist() == pytest.approx([2 * best[0]] * 3)
    soft = drawn(SVDD(4, alpha=1.0))
    assert ((soft > 0) & (soft < guided * math.log(4))).all()
    for unknown in (
        SVDD(4, num_particles=2),
        SMC(),
        ProgressivePruning(),
        ZeroOrderSearch(),
        Refinement(),
        NoiseOptimisation(2),
        TwistedSMC(),
    ):
        assert drawn(unknown) is None
    assert drawn(SMC(1)) == 0  # plain sampling


def test_the_divergence_of_dps_is_that_of_the_shifted_kernels():
    """For a linear reward of x0 the gradient uses dx0/dx; KL = shift^2 / (2 std^2), summed over the steps."""
    value, chain = bound(PosteriorMean(), Linear([1.0, 0.5])), GaussianDiffusion(6)
    state = State.start(chain, ["0"] * 2, range(2))
    expected = torch.zeros(2, dtype=torch.float64)
    while not state.done:
        if state.std > 0:
            _, slope = state.gradient(value)
            shift = 2.0 * state.std**2 * slope
            expected += (shift.flatten(1).double() ** 2).sum(1) / (2 * state.std**2)
            state = state.propose(mean=state.prediction.mean + shift)
        else:
            state = state.propose()
    again = DPS(scale=2.0)(Start(chain, ["0"] * 2, range(2)), value)
    torch.testing.assert_close(torch.as_tensor(again.context.trace.path_kl), expected)
    assert expected.min() > 0


# ---- against a baseline


def write_run(folder, rewards: dict[str, list[float]], text: str = "prompt {}"):
    """Writes a run with two images per prompt, with the given mean reward."""
    folder.mkdir()
    with open(folder / "results.jsonl", "w") as file:
        for index in range(len(next(iter(rewards.values())))):
            for k, offset in enumerate((-0.5, 0.5)):
                row = {
                    "prompt_index": index,
                    "image_index": k,
                    "prompt": text.format(index),
                    "file": f"images/{index:06d}-{k:02d}.png",
                    "rewards": {name: scores[index] + offset for name, scores in rewards.items()},
                }
                file.write(json.dumps(row) + "\n")
    return folder


def test_gains_are_paired_by_prompt(tmp_path):
    """Prompts differ by 100 and the gain is 1: only paired differences show it."""
    base = [100.0 * k for k in range(12)]
    gain = [1 + 0.1 * (k % 3) for k in range(12)]
    plain = write_run(tmp_path / "plain", {"guide": base, "held": base})
    run = write_run(tmp_path / "run", {"guide": [b + g for b, g in zip(base, gain, strict=True)], "held": base})
    found = against(run, plain)
    assert found["guide"]["difference"] == pytest.approx(1.1)
    assert 1.0 < found["guide"]["ci95_low"] < 1.1 < found["guide"]["ci95_high"] < 1.2
    assert found["held"]["difference"] == 0
    assert found["guide"]["prompts"] == 12


@pytest.mark.parametrize(
    ("guide", "held", "lower_is_better", "fallen"),
    [
        (1.0, -0.5, False, ["held"]),
        (1.0, 0.5, False, []),
        (1.0, 0.5, True, ["held"]),
        (1.0, 0.0, False, []),
        (-1.0, -0.5, False, []),
        (0.0, -0.5, False, []),
    ],
)
def test_a_fall_counts_only_if_the_guide_rose(tmp_path, guide, held, lower_is_better, fallen):
    noise = [math.sin(k) for k in range(20)]
    plain = write_run(tmp_path / "plain", {"guide": [0.0] * 20, "held": [0.0] * 20})
    run = write_run(
        tmp_path / "run", {"guide": [guide + 0.3 * e for e in noise], "held": [held + 0.3 * e for e in noise]}
    )
    comparison = against(run, plain)
    assert over_optimised(comparison, "guide", {"held": not lower_is_better}) == fallen
    text = verdict(comparison, "guide", fallen, plain)
    assert (text != "") == bool(fallen)
    if fallen:
        assert "the guide improved, guide by +1" in text
        assert f"held by {held:+.2g}"[:8] in text


@pytest.mark.parametrize("count", [1, 2, 6, 9])
def test_the_p_value_is_the_share_of_sign_flips(count):
    """Of discrete differences, so that many sums are equal."""
    differences = [[1.0, 0.3, 1.0, -0.4, 0.7, 0.1, 0.3, 1.1, -0.2][k] for k in range(count)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=count)]
    share = sum(abs(total) >= sum(differences) - 1e-9 for total in sums) / len(sums)
    assert p_value(differences) == pytest.approx(share, rel=1e-12)
    assert p_value([-difference for difference in differences]) == p_value(differences)


def test_many_differences_are_flipped_by_a_group():
    """The p-value of 40 normal differences is near that of Student's t; the law of the sums is nearly normal."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for shift in (0.0, 0.2, 0.4):
        entry = paired((noise + shift).tolist())
        t = entry["difference"] / entry["standard_error"]
        assert entry["p_value"] == pytest.approx(t_probability(t, 39), rel=0.3, abs=0.005)
    assert p_value([1.0] * 40) == 2**-14
    assert p_value([0.0] * 8) == 1


def differences_of(law: str, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
    other = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "two values": normal.sign(),
        "skewed scores": normal.exp() - other.exp(),
        "heavy tails": normal / other,
        "skewed differences": normal.exp() - math.exp(0.5),
    }[law]


@pytest.mark.parametrize("law", ["normal", "two values", "skewed scores", "heavy tails"])
@pytest.mark.parametrize(("prompts", "held_out"), [(2, 1), (5, 1), (6, 1), (8, 1), (8, 3), (12, 3)])
def test_noise_is_no_over_optimisation(law, prompts, held_out):
    """False alarms occur in at most 2.5 % of 500 runs (standard error 0.7 %); with too few prompts nothing is said."""
    risen = {"guide": paired([1.0 + 0.01 * k for k in range(prompts)])}
    noise = differences_of(law, prompts, 500, held_out, prompts).tolist()
    found = [over_optimised(risen | {str(k): paired(row) for k, row in enumerate(run)}, "guide", {}) for run in noise]
    least = {1: 6, 3: 7}[held_out]
    if prompts < least:
        assert found == [None] * 500
        comparison = risen | {str(k): risen["guide"] for k in range(held_out)}
        said = verdict(comparison, "guide", None, None)
        assert f"cannot be tested with {prompts} prompts" in said
        assert f"draw at least {least} prompts" in said
    else:
        assert sum(map(bool, found)) / 500 < 0.025 + 4 * 0.007


def test_skewed_differences_give_fewer_false_alarms_than_students_t():
    """Of mean 0, they have no exact test: 14 % by Student's t and by sign flips alone."""
    noise = differences_of("skewed differences", 3, 500, 12)
    t = noise.mean(1) / (noise.std(1) / 12**0.5)
    former = int((t < -t_quantile(0.95, 11)).sum())
    found = [entry["difference"] < 0 and entry["p_value"] <= 0.05 for entry in map(paired, noise.tolist())]
    assert sum(found) < 0.6 * former


def test_evenly_spaced_differences_are_significant():
    """Their skewness is 0 up to rounding, whose sign depends on their number."""
    for count in range(6, 51):
        assert p_value([1 + 0.01 * k for k in range(count)]) == pytest.approx(max(2.0 ** (1 - count), 2**-14), abs=2e-4)


def test_a_fall_of_six_prompts_is_found():
    """All six fall: 2 of 64 flips are as far from 0. Of seven rewards each would need a smaller p-value."""
    fallen, risen = paired([-1.0, -1.2, -0.9, -1.1, -1.3, -0.8]), paired([1.0, 1.2, 0.9, 1.1, 1.3, 0.8])
    assert fallen["p_value"] == 2 / 64
    assert over_optimised({"guide": risen, "held": fallen}, "guide", {}) == ["held"]
    assert over_optimised({"guide": risen} | {str(k): fallen for k in range(7)}, "guide", {}) is None
    assert over_optimised({"guide": risen}, "guide", {}) is None
    assert "not tested: no other reward than guide is known of both" in verdict({"guide": risen}, "guide", None, None)
    assert "not tested: runs/plain has no guide" in verdict({"held": fallen}, "guide", None, Path("runs/plain"))
    assert verdict({"guide": risen, "held": risen}, "guide", [], Path("runs/plain")) == ""


def test_a_single_prompt_gives_no_interval(tmp_path):
    plain = write_run(tmp_path / "plain", {"guide": [0.0], "held": [0.0]})
    run = write_run(tmp_path / "run", {"guide": [5.0], "held": [-5.0]})
    comparison = against(run, plain)
    assert comparison["held"]["difference"] == -5
    assert math.isnan(comparison["guide"]["ci95_low"])
    assert over_optimised(comparison, "guide", {}) is None


def edit(folder, change) -> None:
    """Applies a change to each row of a run, in place."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_particles_are_compared_by_weight(tmp_path):
    """Two particles of one image, scores -0.5 and 0.5 around 3, with the heavier one at 0.9, against one of -0.5."""
    plain = write_run(tmp_path / "plain", {"a": [0.0] * 3})
    run = write_run(tmp_path / "run", {"a": [3.0] * 3})
    edit(run, lambda row: row.update(particle=row["image_index"], particle_weight=(0.1, 0.9)[row["image_index"]]))
    found = against(run, plain)["a"]
    assert found["difference"] == pytest.approx(3 + 0.9 * 0.5 - 0.1 * 0.5 + 0.5)
    assert against(plain, run)["a"]["difference"] == pytest.approx(-found["difference"])


def test_only_paired_images_are_compared(tmp_path):
    """The baseline has two images of each prompt, of -0.5 and 0.5; the run has the first one alone."""
    plain = write_run(tmp_path / "plain", {"a": [0.0] * 6})
    run = write_run(tmp_path / "run", {"a": [0.1 * k for k in range(6)]})
    lines = (run / "results.jsonl").read_text().splitlines()
    (run / "results.jsonl").write_text("\n".join(lines[::2]))
    found = against(run, plain)["a"]
    assert found["difference"] == pytest.approx(0.25)
    assert found["p_value"] == p_value([0.1 * k for k in range(6)])
    apart = against(run, plain, unpaired=True)["a"]
    assert apart["difference"] == pytest.approx(0.25 - 0.5)  # the means of all images of each prompt
    assert apart["p_value"] == found["p_value"]  # as many images of each prompt as both have
    assert apart["standard_error"] == pytest.approx(found["standard_error"])
    (plain / "summary.json").write_text("{}")
    (run / "summary.json").write_text('{"prompts": 6}')
    with pytest.raises(
        UserError, match=r"run has fewer images than .*plain of 6 prompts, 'prompt 0', 'prompt 1', 'pro"
    ):
        against(plain, run)


def test_welchs_interval_by_hand():
    """Means 2 and 4 over 3 and 4 prompts; 4.9 degrees of freedom are rounded down to 4."""
    one, other = [1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 7.0]
    variance = 1 / 3 + np.var(other, ddof=1) / 4
    freedom = variance**2 / ((1 / 3) ** 2 / 2 + (np.var(other, ddof=1) / 4) ** 2 / 3)
    assert 4 < freedom < 5
    found = independent(one, other)
    assert found["standard_error"] == pytest.approx(variance**0.5)
    assert found["ci95_high"] == pytest.approx(-2 + 2.776445 * variance**0.5, rel=1e-5)  # t with 4 degrees of freedom
    assert found["difference"] == pytest.approx(-2)
    assert 0.05 < found["p_value"] < 1
    assert math.isnan(independent([1.0], other)["ci95_low"])


def test_only_rewards_of_all_images_are_compared(tmp_path):
    plain = write_run(tmp_path / "plain", {"a": [0.0] * 3, "b": [0.0] * 3})
    run = write_run(tmp_path / "run", {"a": [1.0] * 3, "b": [5.0] * 3, "c": [1.0] * 3})
    edit(run, lambda row: row["rewards"].pop("b") if row["prompt_index"] == 2 and row["image_index"] else None)
    assert list(against(run, plain)) == ["a"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    one = write_run(tmp_path / "one", {"a": [1.0, 2.0]})
    with pytest.raises(UserError, match="measured no reward in common"):
        against(one, write_run(tmp_path / "other", {"b": [1.0, 2.0]}))
    with pytest.raises(UserError, match=r"share no prompt: 'prompt 0', 'prompt 1' in one, 'another' in the other"):
        against(one, write_run(tmp_path / "texts", {"a": [1.0, 2.0]}, text="another"))
    with pytest.raises(UserError, match=r"holds no results\.jsonl"):
        against(one, tmp_path)
    (one / "results.jsonl").write_text("{torn")
    with pytest.raises(UserError, match=r"line 1 is damaged \(not JSON\)"):
        against(one, one)


# ---- images on disk


def save_pictures(folder, count: int, level: float = 0.5, size: int = 32):
    folder.mkdir()
    generator = np.random.default_rng(count)
    for k in range(count):
        pixels = (255 * np.clip(level + 0.3 * generator.standard_normal((size, size, 3)), 0, 1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")
    return folder


def test_images_are_read_unchanged(tmp_path):
    folder = save_pictures(tmp_path / "a", 3)
    Image.new("L", (20, 10), 255).save(folder / "9-grey.jpg")
    (folder / "notes.txt").write_text("no picture")
    pictures = find_pictures(folder)
    assert [picture.file for picture in pictures] == ["000.png", "001.png", "002.png", "9-grey.jpg"]
    batches = list(read_pictures(pictures, 2))
    assert [list(images.shape) for _, images in batches] == [[2, 3, 32, 32], [1, 3, 32, 32], [1, 3, 10, 20]]
    assert batches[2][1].min() > 0.99
    (folder / "torn.png").write_bytes((folder / "000.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"torn\.png cannot be read as a picture"):
        list(read_pictures(find_pictures(folder), 2))
    with pytest.raises(UserError, match="holds no pictures"):
        find_pictures(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_file_names_are_in_natural_order(tmp_path):
    names = ["1.png", "2.png", "10.png", "a2b.png", "a10.png", "b/1.png", "b/02.png", "b/2.png", "b/10.png"]
    (tmp_path / "b").mkdir()
    for name in reversed(names):
        Image.new("L", (4, 4)).save(tmp_path / name)
    pictures = find_pictures(tmp_path)
    assert [picture.file for picture in pictures] == names
    assert [picture.prompt_index for picture in pictures] == list(range(len(names)))


def test_an_evaluation_measures_the_selected_quantities(tmp_path, tiny_clip):
    run, same, other = (save_pictures(tmp_path / n, c, v) for n, c, v in (("r", 9, 0.3), ("s", 8, 0.3), ("o", 7, 0.8)))
    assert Evaluation().measure(find_pictures(run)) == {}
    distances = ["cmmd", "kid", "fid"]
    found = {
        folder.name: Evaluation(tiny_clip, None, str(folder), distances, "clip", batch_size=4).measure(
            find_pictures(run)
        )
        for folder in (same, other)
    }
    assert found["s"]["diversity"] == found["o"]["diversity"]
    assert 0 < found["s"]["diversity"]["pairwise"] < 2
    assert 1 < found["s"]["diversity"]["vendi"] < 9
    assert found["s"]["diversity"]["vendi_within"] is None
    for name in ("cmmd", "fid"):
        assert found["s"]["distances"][name] < found["o"]["distances"][name]
    assert found["s"]["distances"]["kid"]["mean"] < found["o"]["distances"]["kid"]["mean"]


def test_particles_without_weight_do_not_count(tmp_path, tiny_clip):
    """Of each image's two particles one has all the weight: every measurement is that of these alone."""
    run, other = tmp_path / "run", save_pictures(tmp_path / "other", 5, 0.8)
    run.mkdir()
    save_pictures(run / "images", 8, 0.3)
    rows = [
        {
            "prompt_index": k // 4,
            "image_index": k % 4,
            "particle": k % 2,
            "particle_weight": float(k % 2),
            "prompt": "x",
        }
        | {"file": f"images/{k:03d}.png", "rewards": {}}
        for k in range(8)
    ]
    found = []
    for kept in (rows, [row for row in rows if row["particle_weight"]]):
        (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        evaluation = Evaluation(tiny_clip, None, str(other), ["cmmd", "kid", "fid"], "clip", batch_size=3)
        found.append(evaluation.measure(find_pictures(run)))
    for part in ("diversity", "distances"):
        for name, value in found[0][part].items():
            assert name == "reference" or value == pytest.approx(found[1][part][name], rel=1e-4), name


def test_an_evaluation_refuses_incompatible_settings(tmp_path):
    with pytest.raises(ValueError, match="need a reference or a baseline"):
        Evaluation("emoji", distances=["cmmd"])
    with pytest.raises(ValueError, match="set features"):
        Evaluation(None, reference="x", distances=["cmmd"])
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        Evaluation(batch_size=0)
    with pytest.raises(UserError, match="is no run"):
        Evaluation("emoji", baseline=str(tmp_path)).check(1)
    with pytest.raises(UserError, match="is no folder"):
        Evaluation("emoji", reference=str(tmp_path / "absent"), distances=["cmmd"]).check(1)
    with pytest.raises(UserError, match=r"pretrained='./emojis' is not a folder"):
        Evaluation("./emojis").check(1)


def test_a_guided_baseline_gives_a_warning(tmp_path):
    folder = write_run(tmp_path / "plain", {"a": [1.0]})
    with pytest.raises(UserError, match=r"has no readable summary\.json"):
        Evaluation(baseline=str(folder)).check(1)
    (folder / "summary.json").write_text(json.dumps({"sampler": "SVDD"}))
    with pytest.warns(UserWarning, match="is a run guided by SVDD, .* draw the baseline with --model.sampler Unguided"):
        Evaluation(baseline=str(folder)).check(1)
    (folder / "summary.json").write_text(json.dumps({"sampler": "Unguided"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Evaluation(baseline=str(folder)).check(1)


def test_kid_is_the_same_every_time_and_leaves_the_global_generator_alone(tmp_path, tiny_clip):
    run, other = (find_pictures(save_pictures(tmp_path / name, count)) for name, count in (("run", 9), ("other", 6)))
    evaluation = Evaluation(tiny_clip, None, str(other[0].folder), ["kid"], "clip")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(evaluation.measure(run))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert found[0]["distances"]["kid"]["std"] > 0


def test_inception_needs_its_package(tmp_path, monkeypatch):
    import torchmetrics.image.fid

    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    folder = save_pictures(tmp_path / "a", 2)
    evaluation = Evaluation(None, reference=str(folder), distances=["fid"])
    for find_out in (lambda: evaluation.check(2), lambda: evaluation.measure(find_pictures(folder))):
        with pytest.raises(UserError, match=r"pip install 'svdd\[fid\]'"):
            find_out()


def test_features_on_a_device_without_float64_are_compared_on_the_cpu(monkeypatch):
    """Apple's MPS lacks float64: features are moved to the CPU before conversion to float64."""
    moved: list[str] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append("cpu") or self)
    monkeypatch.setattr(torch.Tensor, "double", lambda self: moved.append("double") or self.to(torch.float64))
    diversity, cmmd = Diversity(), CMMD()
    features = torch.eye(3)
    diversity.update(features, torch.tensor([0, 0, 1]))
    cmmd.update(features, real=True)
    cmmd.update(features, real=False)
    assert moved == []
    diversity.compute()
    assert moved[:2] == ["cpu", "double"]
    moved.clear()
    cmmd.compute()
    assert moved == ["cpu", "double"] * (len(moved) // 2) != []
