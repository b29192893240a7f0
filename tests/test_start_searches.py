"""The searches over starts by generations: laws of their starts, their progress, and the frequencies they search."""

import math

import numpy as np
import pytest
import torch

from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.toolbox.frequencies import from_frequencies, low_pass, to_frequencies
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import GaussianDiffusion, Linear, Quadratic, bound, run
from tests.test_samplers import assert_mean, largest_of

SHAPE, MANY = (1, 4, 4), 20000


def wave(k: int, j: int) -> torch.Tensor:
    """Returns the cosine of frequencies k and j, the basis vector of that coefficient, [1, 4, 4]."""
    x, y = (np.cos(math.pi / 4 * f * (np.arange(4) + 0.5)) for f in (k, j))
    product = torch.from_numpy(np.outer(x / np.linalg.norm(x), y / np.linalg.norm(y)))
    return product[None]


def along(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (x * direction).sum((-1, -2, -3))


def starts(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(images: int) -> State:
    return Start(GaussianDiffusion(2, eta=0.0, shape=SHAPE), [""] * images, range(images))()


# ---- frequencies


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 8)])
def test_the_transform_is_orthonormal(shape):
    basis = from_frequencies(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    x = torch.randn(3, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_frequencies(to_frequencies(x)), x)
    assert float(to_frequencies(torch.ones(shape, dtype=torch.float64))[0, 0]) == pytest.approx(math.prod(shape) ** 0.5)


def test_the_coefficients_are_those_of_cosines_and_the_lowest_come_first():
    for k in range(4):
        for j in range(4):
            expected = torch.zeros(SHAPE, dtype=torch.float64)
            expected[0, k, j] = 1
            torch.testing.assert_close(to_frequencies(wave(k, j)), expected)
            passed = low_pass(wave(k, j)[None, None], 0.5)
            torch.testing.assert_close(passed, wave(k, j)[None, None] * (k < 2 and j < 2))


def test_half_precision_is_transformed_in_single():
    x = starts(6).view(2, 3, *SHAPE)
    low = low_pass(x.bfloat16(), 0.5)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, low_pass(x.bfloat16().float(), 0.5).bfloat16())


# ---- laws of the next starts


def assert_law(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Asserts mean and diagonal covariance of the coefficients of x within five standard errors."""
    found = to_frequencies(x).flatten(1)
    covariance = torch.diag(variance.flatten())
    assert ((found.mean(0) - mean.flatten()).abs() <= 5 * (variance.flatten() / len(x)).sqrt() + 1e-9).all()
    scale = torch.outer(variance.flatten(), variance.flatten()).sqrt()
    assert ((found.T.cov() - covariance).abs() <= 5 * scale * (2 / len(x)) ** 0.5 + 1e-9).all()


@pytest.mark.parametrize("frequencies", [0.5, 1.0])
def test_mutants_of_starts_are_standard_normal_and_as_close_as_the_radius_says(frequencies):
    sampler = EvolutionarySearch(1, MANY, num_elites=MANY, radius=0.6, decay=0.5, frequencies=frequencies)
    elites, searched = starts(2 * MANY).view(2, MANY, *SHAPE), torch.zeros(4, 4, dtype=torch.float64)
    searched[: round(4 * frequencies), : round(4 * frequencies)] = 1
    children = sampler.children(elites, torch.tensor([0, 1]), state_of(2)).view_as(elites)
    for image, radius in enumerate((0.6, 0.3)):
        assert_law(children[image], torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.float64))
        kept = 1 - searched + searched * math.sqrt(1 - radius**2)
        change = to_frequencies(children[image]) - kept * to_frequencies(elites[image])
        assert_law(from_frequencies(change), torch.zeros(4, 4), searched * radius**2)


def test_the_gaussian_is_fitted_to_the_low_frequencies_of_the_elites():
    sampler = CrossEntropySearch(1, MANY, num_elites=3, shrinkage=0.2, frequencies=0.5)
    elites = starts(3)[None]
    children = sampler.children(elites, torch.zeros(1), state_of(1))
    found = to_frequencies(elites[0])[:, 0]
    mean, variance = found[0].clone(), torch.zeros(4, 4, dtype=torch.float64)
    mean[:2, :2] = math.sqrt(0.8) * found[:, :2, :2].mean(0)
    variance[:2, :2] = 0.8 * found[:, :2, :2].var(0, unbiased=False) + 0.2
    assert_law(children, mean, variance)


# ---- progress


def test_with_one_first_start_and_one_elite_it_is_zero_order_search():
    diffusion, value = GaussianDiffusion(3, shape=SHAPE), bound(PosteriorMean(), Linear(wave(1, 2).flatten().tolist()))
    evolved = run(diffusion, EvolutionarySearch(6, 3, num_starts=1, radius=0.5, decay=0.7), value, 4)
    torch.testing.assert_close(evolved.x, run(diffusion, ZeroOrderSearch(6, 3), value, 4).x)


def simulated(sampler, frequency_is_searched: bool, runs: int = 40000) -> np.ndarray:
    """Returns the best coefficient that the search finds if the reward is that coefficient alone: a law on the line."""
    rng, f, n = np.random.default_rng(0), sampler.num_starts, sampler.num_candidates
    pool, failures = rng.standard_normal((runs, f)), np.zeros(runs)
    for _ in range(sampler.num_generations if frequency_is_searched else 0):
        pool = -np.sort(-pool, 1)[:, : sampler.num_elites]
        if isinstance(sampler, CrossEntropySearch):
            s, fitted = sampler.shrinkage, pool.mean(1, keepdims=True)
            new = fitted + pool.std(1, keepdims=True) * rng.standard_normal((runs, n))
            new = math.sqrt(1 - s) * new + math.sqrt(s) * rng.standard_normal((runs, n))
        else:
            radius = (sampler.radius * sampler.decay**failures)[:, None]
            parents = pool[:, np.arange(n) % pool.shape[1]]
            new = np.sqrt(1 - radius**2) * parents + radius * rng.standard_normal((runs, n))
        failures += new.max(1) <= pool[:, 0]
        pool = np.concatenate([pool, new], 1)
    return pool.max(1)


@pytest.mark.parametrize("frequency", [(1, 0), (3, 2)])
@pytest.mark.parametrize(
    ("sampler", "margin"),  # by which the search beats random search with as many evaluations, in standard deviations
    [
        (EvolutionarySearch(10, frequencies=0.5), 0.7),
        (EvolutionarySearch(10, num_elites=3, frequencies=0.5), 0.3),
        (CrossEntropySearch(10, frequencies=0.5), 0.3),
    ],
)
def test_the_best_start_follows_the_law_of_the_search(sampler, margin, frequency):
    """The reward is the coefficient of one frequency: searched, it follows the law; above the band, the best of F."""
    diffusion, direction = GaussianDiffusion(1, eta=0.0, shape=SHAPE), wave(*frequency)
    value = bound(PosteriorMean(), Linear(direction.flatten().tolist()))
    gain, offset, _ = diffusion.end(0)
    found = (run(diffusion, sampler, value, 250).scores(value.reward) - offset * float(direction.sum())) / gain
    searched = frequency[0] < 2
    expected = simulated(sampler, searched)
    assert_mean(found, float(expected.mean()), slack=4 * float(expected.std()) / math.sqrt(len(expected)))
    evaluations = sampler.num_starts + sampler.num_generations * sampler.num_candidates
    if searched:
        assert float(found.mean()) > largest_of(evaluations) + margin
    else:
        assert_mean(found, largest_of(sampler.num_starts))


@pytest.mark.parametrize("sampler", [EvolutionarySearch(80), CrossEntropySearch(40, 4, num_elites=4, frequencies=1.0)])
def test_the_search_approaches_the_known_optimum(sampler):
    """The end is linear in the start, so a quadratic reward has its maximum at a known start."""
    diffusion, centre = GaussianDiffusion(2, eta=0.0, shape=SHAPE), starts(1, seed=7)[0]
    gain, offset, _ = diffusion.end(0)
    value = bound(PosteriorMean(), Quadratic((gain * centre + offset).flatten().tolist()))

    def distance(final: State) -> float:
        """Returns the root mean squared error of a coefficient of the start that was found."""
        return float(((final.x - offset) / gain - centre).square().mean().sqrt())

    final = run(diffusion, sampler, value, 20)
    assert distance(final) < 0.5
    assert distance(run(diffusion, RandomSearch(164), value, 20)) > 0.8
    for trace in final.context.trace.per_image():
        assert trace["value_chosen"] == sorted(trace["value_chosen"])
