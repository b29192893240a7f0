"""GLASS transitions against exact posteriors, and what they cost."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from svdd import UserError
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.kernels.glass import glass
from svdd.diffusion.kernels.transition import Transition
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.brightness import Brightness
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import count, fit_budget
from svdd.samplers.dps import DPS
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import ExactSoftValue, FlowGaussian, Linear, bound, run
from tests.test_samplers import B, assert_mean, assert_variance, label, rewards, value_of

# ---- a mixture of two Gaussians, whose posteriors are mixtures

WEIGHTS, MEANS, S = (torch.tensor(values, dtype=torch.float64) for values in ((0.7, 0.3), (-1.5, 2.0), 0.3))
NORMALS = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
Mixture = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weights, means [..., modes], and one standard deviation


def posterior(statistic: torch.Tensor, precision: float) -> Mixture:
    """Returns the law of x0 given x0 + N(0, 1 / precision)."""
    evidence, variance = S**2 + 1 / precision, 1 / (precision + S**-2)
    residual = statistic[..., None] - MEANS
    weights = (WEIGHTS.log() - residual**2 / (2 * evidence)).softmax(-1)
    return weights, MEANS + S**2 / evidence * residual, variance.sqrt()


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    sigma = float(t) / 1000
    if sigma == 1:
        return x - WEIGHTS @ MEANS
    weights, means, _ = posterior(x / (1 - sigma), ((1 - sigma) / sigma) ** 2)
    return (x - (weights * means).sum(-1)) / sigma


def distance(x: torch.Tensor, law: Mixture) -> float:
    """Returns the Wasserstein distance of equally likely points from a mixture."""
    grid = torch.linspace(-7, 7, 2801, dtype=torch.float64)
    weights, means, std = law
    exact = (weights * torch.special.ndtr((grid[:, None] - means) / std)).sum(-1)
    found = torch.searchsorted(x.flatten().sort()[0], grid) / x.numel()
    return float((exact - found).abs().sum() * (grid[1] - grid[0]))


def step(x: torch.Tensor, sigmas: list[float], i: int, transition: Transition) -> torch.Tensor:
    """Returns the children of every x, one for each quantile of the noise, [len(x), 500]."""
    kernel = FLOW_KERNELS["euler"]({}, len(sigmas), transition, {"sigmas": sigmas})
    x = x[:, None].expand(-1, len(NORMALS))
    known = kernel.predict(x, network(x, kernel.timesteps[i]), i)
    return glass(kernel, x, known.x0, NORMALS.expand_as(x), i, network)


@pytest.mark.parametrize("rho", [None, 0.4, 0.0])
@pytest.mark.parametrize("sigmas", [[1.0, 0.7], [0.6, 0.4], [0.9, 0.3], [0.5, 0.0]], ids=str)
def test_inner_steps_converge_to_the_exact_transition(sigmas, rho):
    """Given x0, x' is N(alpha' x0 + rho sigma' (x - alpha x0) / sigma, sigma'^2 (1 - rho^2)), and x0 a mixture."""
    (sigma, following), x = sigmas, torch.tensor([-0.8, 0.3, 1.0], dtype=torch.float64)
    correlation = (1 - sigma) * following / ((1 - following) * sigma) if rho is None else rho
    gain, std = correlation * following / sigma, following * math.sqrt(1 - correlation**2)
    weight = 1 - following - gain * (1 - sigma)
    errors = []
    for inner_steps in (1, 2, 4, 16):
        found = step(x, sigmas, 0, Transition(rho=rho, inner_steps=inner_steps))
        error = 0.0
        for row, here in zip(found, x, strict=True):
            weights, means, spread = WEIGHTS, MEANS, S
            if sigma < 1:
                weights, means, spread = posterior(here / (1 - sigma), ((1 - sigma) / sigma) ** 2)
            law = weights, gain * here + weight * means, ((weight * spread) ** 2 + std**2) ** 0.5
            error += distance(row, law) / len(x)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.15 * errors[0]


@pytest.mark.parametrize("rho", [None, 0.8, 0.4, 0.0])
def test_the_marginal_law_is_kept_for_every_correlation(rho):
    sigma, following = 0.6, 0.4
    spread = math.sqrt(((1 - sigma) * float(S)) ** 2 + sigma**2)
    quantiles = [torch.special.ndtri((torch.arange(k, dtype=torch.float64) + 0.5) / k) for k in (210, 90)]
    x = torch.cat([(1 - sigma) * mean + spread * part for mean, part in zip(MEANS, quantiles, strict=True)])
    law = WEIGHTS, (1 - following) * MEANS, torch.tensor(math.sqrt(((1 - following) * float(S)) ** 2 + following**2))
    found = [
        distance(step(x, [sigma, following], 0, Transition(rho=rho, inner_steps=inner_steps)), law)
        for inner_steps in (1, 32)
    ]
    assert found[1] < 0.01
    assert found[0] > 4 * found[1]  # the Gaussian step takes the mean of x0, so the modes lose their spread


def test_one_inner_step_is_the_gaussian_step():
    kernel = FLOW_KERNELS["euler"]({"shift": 3.0}, 6, Transition(rho=0.4))
    for i in range(5):
        x, noise = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        known = kernel.predict(x, network(x, kernel.timesteps[i]), i)
        torch.testing.assert_close(
            glass(kernel, x, known.x0, noise, i, network), known.mean + kernel.std(i) * noise, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("inner_steps", "spreads"), [(1, (0.861, 0.769, 0.648)), (3, (0.856, 0.851, 0.821)), (6, (0.884, 0.885, 0.879))]
)
def test_the_spread_of_a_chain_at_equal_network_evaluations(inner_steps, spreads):
    """The table of docs/explanation/transitions.md: data N(0, 1), 24 evaluations."""
    steps = 24 // inner_steps
    for arguments, spread in zip(({}, {"rho": 0.4}, {"noise": "fresh"}), spreads, strict=True):
        transition = Transition(**arguments, inner_steps=inner_steps)
        kernel = FLOW_KERNELS["euler"]({"shift": 3.0}, steps, transition, {"sigmas": 1 - np.arange(steps) / steps})
        assert FlowGaussian(kernel, mu=0.0, s=1.0).end_law()[1] ** 0.5 == pytest.approx(spread, abs=6e-4)


# ---- laws of samplers on flow models

ALPHA = 0.7
CHAINS = {
    "fresh": ("euler", Transition("fresh")),
    "glass": ("euler", Transition(rho=0.4, inner_steps=3)),
    "vp": ("ddim", Transition()),
}


def flow(kind: str, steps: int = 5) -> FlowGaussian:
    name, transition = CHAINS[kind]
    return FlowGaussian(FLOW_KERNELS[name]({"shift": 3.0}, steps, transition))


@pytest.mark.parametrize("kind", CHAINS)
def test_samplers_reach_the_tilted_law_of_a_flow_model(kind):
    """As on the diffusion chains of test_samplers and test_particle_laws."""
    diffusion = flow(kind)
    mean, variance = diffusion.end_law()
    plain = run(diffusion, Unguided(), value_of(), 1000)
    assert_mean(plain.x.flatten(), mean)
    assert_variance(plain.x.flatten(), variance)
    value = bound(ExactSoftValue(ALPHA), Linear(B))
    chosen, shift = run(diffusion, SVDD(64, ALPHA), value, 600), diffusion.end(0)[2] / ALPHA
    assert_mean(rewards(chosen), mean * sum(B) + shift, slack=0.03 * shift)
    final = run(diffusion, SMC(800, ALPHA, returns="all"), value_of(), 60)
    weights, x = final.context.trace.weights, rewards(final).view(60, -1)
    assert_mean((weights * x).sum(1), mean * sum(B) + variance / ALPHA)


# ---- costs and independence


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        (Unguided(), 6 * 3),
        (BestOfN(4), 4 * 6 * 3),
        (SVDD(4, 0.5), 1 + 4 * 5 * 3 + 4 * 2),
        (SVDD(4, 0.5, num_particles=2, score_parent=True), 2 * 6 + 4 * 2 * 6 * 2),
        (SMC(4), 4 * 6 * 3),
        (ZeroOrderSearch(2, 3), 7 * 6 * 3),
        (RolloverBudget(4, 1), 1 + 4 * 5 * 3 + 4 * 2),
    ],
    ids=lambda case: label(case) if isinstance(case, Sampler) else str(case),
)
def test_inner_steps_are_counted(sampler: Sampler, rows):
    """Every candidate costs two rows more, at the last step too, which has noise."""
    diffusion = flow("glass", steps=6)
    final = run(diffusion, sampler, value_of(), 2)
    ledger = final.context.ledger
    assert ledger.denoiser_rows == ledger.network_rows == sum(diffusion.denoised_rows) == 2 * rows
    assert count(sampler, diffusion, PosteriorMean()).denoiser_rows == rows


def test_a_budget_includes_inner_steps():
    diffusion = flow("glass", steps=6)
    assert fit_budget(BestOfN(1), 100, diffusion, PosteriorMean()).num_particles == 100 // 18


@pytest.mark.parametrize("sampler", [DPS(), TwistedSMC(2)], ids=label)
def test_samplers_that_shift_a_gaussian_refuse_inner_steps(sampler):
    with pytest.raises(UserError, match=r"shifts the mean of Gaussian steps.*inner_steps=3 are not Gaussian"):
        sampler.check(flow("glass"), value_of())
    sampler.check(flow("vp"), value_of())


def test_images_of_a_real_model_do_not_depend_on_each_other(sd15):
    """Guidance counts twice; values of x0 at another guidance scale and of a lookahead work as on other chains."""
    diffusion = StableDiffusion(sd15, 3, 2.0, rho=0.4, inner_steps=3, height=16, width=16, reproducible=True)
    prompts, seeds = ["red apple", "blue car"], [3, 8]
    for sampler, value in ((SVDD(2), Lookahead()), (ZeroOrderSearch(1, 2), PosteriorMean(guidance_scale=1.0))):
        value.bind(Brightness(), diffusion)
        with torch.no_grad():
            draw = partial(run, diffusion, sampler, value)
            both = draw(prompts=prompts, seeds=seeds)
            alone = draw(prompts=prompts[1:], seeds=seeds[1:])
        assert both.images.isfinite().all()
        assert torch.equal(both.x[1:], alone.x)
    with torch.no_grad():
        ledger = run(diffusion, Unguided(), None, prompts=prompts, seeds=seeds).context.ledger
        start = Start(diffusion, prompts, seeds)()
        assert not torch.equal(start.propose().x, start.prediction.mean)
    assert (ledger.denoiser_rows, ledger.network_rows) == (2 * 3 * 3, 4 * 3 * 3)


class InFlowCoordinates(StableDiffusion):
    """A model as a flow model: the network is given x / (alpha + sigma), told 1000 s, and predicts v = noise - x0."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.own = self.kernel
        sigmas = [sigma / (alpha + sigma) for alpha, sigma in self.own.levels]
        self.kernel = FLOW_KERNELS["euler"]({}, len(sigmas) - 1, self.transition, {"sigmas": sigmas[:-1]})
        self.kernel.levels[-1], self.kernel._sigmas[-1] = (1 - sigmas[-1], sigmas[-1]), sigmas[-1]

    def initial(self, noise):
        return noise / sum(self.own.levels[0])

    def decode(self, x0):
        return super().decode(x0 * sum(self.own.levels[-1]))  # emoji's DDIM ends at a little noise

    def evaluate(self, x, t, conditioning, row, guidance_scale):
        sigma = float(t) / 1000

        def network(x, t):
            return super(InFlowCoordinates, self).evaluate(x, t, conditioning, row, guidance_scale)

        return (x - self.own.denoise(x / (1 - sigma), (1 - sigma) / sigma, network)) / sigma


@pytest.mark.parametrize("transition", [{}, {"rho": 0.4, "inner_steps": 2}, {"eta": 0.0}], ids=str)
def test_the_embedded_model_draws_the_same_pictures_in_flow_coordinates(transition):
    pictures = []
    for kind in (StableDiffusion, InFlowCoordinates):
        diffusion = kind("emoji", 5, 3.0, **transition)
        with torch.no_grad():
            final = run(diffusion, Unguided(), None, prompts=["panda", "pizza"], seeds=[0, 5])
            pictures.append(final.context.diffusion.decode(final.x))
    torch.testing.assert_close(*pictures, rtol=0, atol=2e-3)
    assert pictures[0].std() > 0.2
