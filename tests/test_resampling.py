"""Resamplers: copies are unbiased and within bounds, also in corner cases; and the weights that trigger them."""

import math
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdd.samplers.toolbox.selection import RESAMPLERS, effective_sample_size
from svdd.samplers.toolbox.weights import (
    POTENTIALS,
    SCHEDULES,
    Potential,
    Resampler,
    Tempering,
    Weighing,
    Weights,
    adapt,
)

NAMES = list(RESAMPLERS)
WEIGHTS = {
    "random": [0.31, 0.02, 0.17, 0.4, 0.1],
    "thirds": [1 / 3, 1 / 3, 1 / 3],
    "sevenths": [2 / 7, 1 / 7, 0.0, 1 / 7, 2 / 7, 0.0, 1 / 7],
    "tenths": [0.1, 0.2, 0.3, 0.4],
    "one": [1.0],
    "almost whole": [0.5 - 1e-13, 0.5 + 1e-13],
}


def uniforms(groups: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(groups, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_of(weights) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).log()


def copies(index: torch.Tensor) -> torch.Tensor:
    """Returns the number of copies of each particle, [groups, k]."""
    return torch.zeros(index.shape, dtype=torch.float64).scatter_add_(1, index, torch.ones(index.shape).double())


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_unbiased_and_within_their_bounds(name, weights):
    groups, k = 40_000, len(weights)
    index = RESAMPLERS[name](log_of(weights).expand(groups, -1), uniforms(groups, k))
    assert index.shape == (groups, k)
    assert index.dtype == torch.int64
    counts, expected = copies(index), k * torch.tensor(weights, dtype=torch.float64)
    error = counts.std(0) / math.sqrt(groups)
    assert ((counts.mean(0) - expected).abs() <= 4.5 * error + 1e-9).all()
    slack = {"systematic": 0, "ssp": 0, "stratified": 1, "residual": None, "multinomial": None}[name]
    low, high = (expected - 1e-9).ceil() - 1, (expected + 1e-9).floor() + 1
    low, high = (
        torch.where((expected - expected.round()).abs() < 1e-9, expected.round(), low),
        torch.where((expected - expected.round()).abs() < 1e-9, expected.round(), high),
    )
    if slack is not None:
        assert (counts >= low - slack).all()
        assert (counts <= high + slack).all()
    if name == "residual":
        assert (counts >= (expected + 1e-9).floor()).all()
    assert (counts[:, expected == 0] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_corners(name):
    resample, ninf = RESAMPLERS[name], -math.inf
    one_hot = torch.tensor([[ninf, ninf, 3.0, ninf]] * 50, dtype=torch.float64)
    assert (resample(one_hot, uniforms(50, 4)) == 2).all()
    steep = torch.tensor([[0.0, 1e4, -1e4, 9e3]] * 50)
    assert (resample(steep, uniforms(50, 4)) == 1).all()
    uniform = torch.zeros(50, 6, dtype=torch.float64)
    if name != "multinomial":
        assert (copies(resample(uniform, uniforms(50, 6))) == 1).all()
    almost_one = torch.full((1, 6), 1 - 2**-53, dtype=torch.float64)
    for extreme in (torch.zeros(1, 6, dtype=torch.float64), almost_one):
        index = resample(log_of([0.1, 0.2, 0.3, 0.0, 0.4, 0.0])[None], extreme)
        assert ((index >= 0) & (index < 6)).all()
        assert not ((index == 3) | (index == 5)).any()


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_independent(name):
    resample, log_w, u = (
        RESAMPLERS[name],
        3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(1)),
        uniforms(20, 7),
    )
    whole = resample(log_w, u)
    assert torch.equal(whole, torch.cat([resample(log_w[g : g + 1], u[g : g + 1]) for g in range(20)]))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(resample(log_w[order], u[order]), whole[order])
    assert torch.equal(copies(resample(log_w.double() + 1e3, u)), copies(resample(log_w.double(), u)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_invalid_weights_are_refused(name, bad):
    with pytest.raises(ValueError, match="log-weights"):
        RESAMPLERS[name](torch.tensor([bad]), uniforms(1, 2))


def test_multinomial_is_the_noisiest():
    log_w, values = log_of(WEIGHTS["random"]).expand(40_000, -1), torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0])
    spread = {name: float(values[f(log_w, uniforms(40_000, 5))].mean(1).var()) for name, f in RESAMPLERS.items()}
    assert all(spread["multinomial"] > 1.2 * spread[name] for name in NAMES if name != "multinomial")


def test_two_fractions_of_ssp_settle_as_one():
    """Exactly one of the fractions 0.6 and 0.4 becomes a copy."""
    index = RESAMPLERS["ssp"](log_of([0.3, 0.7]).expand(40_000, -1), uniforms(40_000, 2))
    counts = copies(index)
    assert set(map(tuple, counts.tolist())) == {(1.0, 1.0), (0.0, 2.0)}
    assert float((counts[:, 0] == 1).double().mean()) == pytest.approx(0.6, abs=4.5 * math.sqrt(0.24 / 40_000))


@pytest.mark.parametrize("name", NAMES)
def test_a_large_population_takes_few_operations(name):
    """A Python loop over 10,000 particles would take at least as many."""

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counter.operations += 1
            return function(*args, **(kwargs or {}))

    log_w = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Counter():
        index = RESAMPLERS[name](log_w, uniforms(1, 10_000))
    assert Counter.operations < 1000
    expected = 10_000 * log_w.softmax(1)
    assert name not in ("ssp", "systematic") or ((copies(index) - expected).abs() < 1).all()


def test_the_effective_sample_size():
    log_w = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf], [math.log(3.0), 0.0, -math.inf]])
    torch.testing.assert_close(effective_sample_size(log_w), torch.tensor([3.0, 1.0, 1.6], dtype=torch.float64))
    torch.testing.assert_close(effective_sample_size(log_w.double() + 1e4), effective_sample_size(log_w))


# ---- weights


def weighing(**options) -> Weighing:
    defaults = {"alpha": 0.5, "potential": "difference", "resampler": "ssp", "ess_threshold": 0.5, "tempering": "none"}
    return Weighing(**defaults | options)


def test_every_setting_that_a_sampler_accepts_is_implemented():
    assert get_args(Potential) == tuple(POTENTIALS)
    assert get_args(Resampler) == tuple(RESAMPLERS)
    assert get_args(Tempering) == (*SCHEDULES, "adaptive")


def path_of_values(groups=3, particles=6, steps=5, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(groups, particles, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("tempering", [*SCHEDULES, "adaptive"])
@pytest.mark.parametrize("potential", list(POTENTIALS))
def test_potentials_multiply_to_the_tilt(potential, tempering):
    if tempering == "adaptive" and potential != "difference":
        pytest.skip("refused")
    values, rule = path_of_values(), weighing(potential=potential, tempering=tempering)
    weights = Weights.equal(3, 6, values[0].device)
    for i, v in enumerate(values, start=1):
        weights = rule.weigh(weights, v, i / len(values))
    torch.testing.assert_close(weights.log_w, values[-1] / 0.5)


def test_differences_telescope_at_every_step_and_max_never_falls():
    plain, peak = weighing(), weighing(potential="max")
    first = second = Weights.equal(3, 6, torch.device("cpu"))
    for i, v in enumerate(path_of_values()[:-1], start=1):
        first, before, second = plain.weigh(first, v, i / 9), second, peak.weigh(second, v, i / 9)
        torch.testing.assert_close(first.log_w, v / 0.5)
        assert (second.peak >= before.peak).all()


def test_histories_follow_the_particles_and_only_degenerate_groups_resample():
    weights = Weights.equal(2, 4, torch.device("cpu"))
    v = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.1, 0.0]], dtype=torch.float64)
    rule = weighing(potential="sum")
    weights = rule.weigh(weights, v, 0.5)
    index, after = rule.resample(weights, uniforms(2, 4))
    assert index[0].tolist() == [0, 0, 0, 0]  # it has all the weight
    assert index[1].tolist() == [0, 1, 2, 3]  # high effective sample size
    torch.testing.assert_close(after.log_normaliser, weights.log_normaliser)
    torch.testing.assert_close(after.log_w[0], weights.log_normaliser[:1].expand(4))
    assert torch.equal(after.log_w[1], weights.log_w[1])
    for name in ("log_potentials", "peak", "total"):
        assert torch.equal(getattr(after, name), getattr(weights, name).gather(1, index))


@pytest.mark.parametrize(("threshold", "always"), [(0.0, False), (1.0, True)])
def test_thresholds_0_and_1(threshold, always):
    weights = weighing().weigh(Weights.equal(5, 6, torch.device("cpu")), path_of_values(5)[0], 0.5)
    _, after = weighing(ess_threshold=threshold).resample(weights, uniforms(5, 6))
    shared = (after.log_w == after.log_w[:, :1]).all(1)
    assert shared.all() if always else not shared.any()


def test_adaptive_tempering_stops_at_the_threshold():
    rule, weights = weighing(tempering="adaptive", alpha=0.05), Weights.equal(4, 6, torch.device("cpu"))
    values, last = path_of_values(4), torch.zeros(4, 1, dtype=torch.float64)
    for i, v in enumerate(values[:-1], start=1):
        weights = rule.weigh(weights, v, i / len(values))
        assert (weights.exponent >= last).all()
        assert (weights.exponent <= 1).all()
        size = effective_sample_size(weights.log_w)
        held = (weights.exponent[:, 0] < 1) & (weights.exponent > last)[:, 0]
        torch.testing.assert_close(size[held], torch.full_like(size[held], 3.0), rtol=1e-5, atol=0)
        last = weights.exponent
        _, weights = rule.resample(weights, uniforms(4, 6, i))
    assert (last < 1).any()
    assert (rule.weigh(weights, values[-1], 1).exponent == 1).all()


def test_the_next_exponent_meets_the_effective_sample_size():
    """Two particles with weights 1 and exp(-x): ESS = (1 + e^-x)^2 / (1 + e^-2x) = 1.6 at e^-x = 1 / 3."""
    gap = torch.tensor([[0.0, -4.0], [0.0, -8.0], [0.0, -0.1]], dtype=torch.float64)
    found = adapt(Weights.equal(3, 2, gap.device), gap, 1.6)
    expected = torch.tensor([[math.log(3) / 4], [math.log(3) / 8], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
