import doctest
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from svdd.evaluation.metrics import CMMD, Diversity, RewardStatistics, distances, diversity, reward_statistics


def reference(scores):
    return {
        "count": len(scores),
        "mean": scores.mean(),
        "std": scores.std(ddof=1),
        "standard_error": scores.std(ddof=1) / np.sqrt(len(scores)),
        "min": scores.min(),
        "max": scores.max(),
        "median": np.median(scores),
        "top10": np.quantile(scores, 0.9),
        "top20": np.quantile(scores, 0.8),
    }


def numbers(statistics):
    """All statistics except those that depend on prompts, which are tested separately."""
    return {
        name: value.item()
        for name, value in statistics.compute().items()
        if name not in ("ci95_low", "ci95_high", "std_within")
    }


def draw(n, seed=0):
    return np.random.default_rng(seed).normal(5.0, 2.0, n)


@pytest.mark.parametrize("n", [2, 3, 10, 11, 1000])
def test_equals_numpy(n):
    scores = draw(n)
    statistics = RewardStatistics()
    for batch in np.array_split(scores, 4):
        statistics.update(torch.from_numpy(batch))
    assert numbers(statistics) == pytest.approx(reference(scores), rel=1e-12)
    assert list(statistics.compute()) == [
        "count",
        "mean",
        "std",
        "std_within",
        *list(reference(scores))[3:],
        "ci95_low",
        "ci95_high",
    ]


def test_formulas_by_hand():
    statistics = RewardStatistics()
    statistics.update(torch.tensor([4.0, 1.0, 2.0, 3.0]))
    expected = {"mean": 2.5, "median": 2.5, "top10": 3.7, "top20": 3.4, "std": math.sqrt(5 / 3)}
    result = numbers(statistics)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-14)


def test_order_and_batches_do_not_change_a_bit():
    scores = torch.from_numpy(draw(5000)) * 10.0 ** torch.randint(-8, 8, (5000,))
    one, other = RewardStatistics(), RewardStatistics()
    one.update(scores)
    for batch in scores[torch.randperm(5000)].split(7):
        other.update(batch)
    assert numbers(one) == numbers(other)


def test_none_and_one():
    statistics = RewardStatistics()
    statistics.update(torch.zeros(0))
    result = numbers(statistics)
    assert result.pop("count") == 0
    assert all(math.isnan(value) for value in result.values())
    statistics.update(torch.tensor([2.5]))
    result = numbers(statistics)
    assert math.isnan(result.pop("std"))
    assert math.isnan(result.pop("standard_error"))
    assert result == {"count": 1} | dict.fromkeys(("mean", "min", "max", "median", "top10", "top20"), 2.5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_never_updated_and_reset():
    statistics = RewardStatistics()
    assert numbers(statistics)["count"] == 0
    statistics.update(torch.tensor([1.0, 2.0]))
    statistics.reset()
    assert numbers(statistics)["count"] == 0


@pytest.mark.parametrize(("scores", "bad"), [([1.0, math.nan, math.inf], 2), ([-math.inf], 1)])
def test_refuses_scores_that_are_not_finite(scores, bad):
    statistics = RewardStatistics()
    with pytest.raises(ValueError, match=f"{bad} of {len(scores)} scores are NaN or infinite"):
        statistics.update(torch.tensor(scores))


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"shape \[n\]"):
        RewardStatistics().update(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_takes_any_dtype_and_computes_in_float64(dtype):
    scores = torch.tensor([1.0, 3.0, 100.0, 7.0]).to(dtype)
    statistics = RewardStatistics().half()
    statistics.update(scores)
    assert numbers(statistics) == pytest.approx(reference(scores.double().numpy()), rel=1e-12)
    assert statistics.compute()["mean"].dtype == torch.float64


def test_memory_is_flat_and_the_input_is_not_aliased():
    statistics = RewardStatistics()
    batch = torch.ones(3, dtype=torch.float64)
    for _ in range(1000):
        statistics.update(batch)
    assert len(statistics.scores) <= math.log2(1000) + 1
    batch.zero_()
    assert numbers(statistics)["mean"] == 1.0


def test_update_after_compute_and_in_inference_mode():
    statistics = RewardStatistics()
    with torch.inference_mode():
        statistics.update(torch.tensor([1.0]))
    assert numbers(statistics)["count"] == 1
    statistics.update(torch.tensor([3.0]))
    assert numbers(statistics)["mean"] == 2.0
    assert statistics(torch.tensor([5.0]))["mean"].item() == 5.0
    assert numbers(statistics)["mean"] == 3.0


COUNTS = [(7, 4), (5, 0), (0, 5), (0, 0)]


def prompts_of(n, rank=0):
    """Prompts with two images each, split across ranks."""
    return torch.arange(n) // 2 + 2 * rank


def features_of(n, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.3, 1.0, (n, 6))).float()


def measured(parts):
    """Returns each metric of images that arrive in parts, given as (count, seed)."""
    statistics, diversity, cmmd = RewardStatistics(), Diversity(), CMMD()
    for count, rank in parts:
        for rows in torch.arange(count).split(3) if count else ():
            prompts, features = prompts_of(count, rank)[rows], features_of(count, rank)[rows]
            statistics.update(torch.from_numpy(draw(count, seed=rank))[rows], prompts)
            diversity.update(features, prompts)
            cmmd.update(features, real=False)
            cmmd.update(features_of(count, rank + 7)[rows], real=True)
    found = {name: value.item() for name, value in (statistics.compute() | diversity.compute()).items()}
    return found | {"cmmd": cmmd.compute().item()}


def work(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save([measured([(counts[rank], rank)]) for counts in COUNTS], results / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks(tmp_path):
    mp.start_processes(work, (tmp_path / "store", tmp_path), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for counts, one, other in zip(COUNTS, first, second, strict=True):
        assert one == pytest.approx(measured(list(zip(counts, (0, 1), strict=True))), rel=1e-9, nan_ok=True)
        assert other == pytest.approx(one, rel=0, abs=0, nan_ok=True)
        if any(counts):
            assert one["ci95_low"] < one["mean"] < one["ci95_high"]
            assert one["std_within"] > 0
            assert 1 < one["vendi_within"] < one["vendi"] <= 6
            assert one["cmmd"] > 0


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (reward_statistics, 6),
        (diversity, 4),
        (distances, 5),
    ],
)
def test_examples(module, count):
    failures, tried = doctest.testmod(module)
    assert (failures, tried) == (0, count)
