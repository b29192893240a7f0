"""Noise optimisation against the optimum of a linear chain with a quadratic reward, and its regulariser."""

import math

import pytest
import torch

from svdd import UserError
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.budget import count
from svdd.samplers.dps import DPS
from svdd.samplers.noise_optimisation import NoiseOptimisation, norm_log_density, norm_slope
from svdd.samplers.unguided import Unguided
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, Quadratic, bound, run
from tests.test_samplers import B, value_of

CENTRE = [1.0, -2.0, 0.5, 1.5]


def test_the_regulariser_is_the_log_density_of_the_chi_law_and_largest_at_its_mode():
    d = 12
    z = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    norm = z.flatten(1).norm(dim=1)
    density = norm ** (d - 1) * torch.exp(-(norm**2) / 2) / (2 ** (d / 2 - 1) * math.gamma(d / 2))
    constant = density.log() - norm_log_density(z)
    torch.testing.assert_close(constant, constant[:1].expand(5))
    (slope,) = torch.autograd.grad(norm_log_density(z).sum(), z)
    torch.testing.assert_close(norm_slope(z), slope)
    mode = z.detach() / norm.detach().view(-1, 1, 1, 1) * math.sqrt(d - 1)
    torch.testing.assert_close(norm_slope(mode), torch.zeros_like(mode))
    assert all((norm_log_density(mode * factor) < norm_log_density(mode)).all() for factor in (0.9, 1.1))


@pytest.mark.parametrize(("eta", "weight"), [(0.0, 0.0), (0.0, 0.3), (1.0, 0.3)])
def test_it_converges_to_the_optimum_of_the_reward_and_the_regulariser(eta, weight):
    """x_T = A z + h, where h holds the noise of the steps.

    The maximum of -|A z + h - centre|^2 / 2 + weight ((d - 1) log |z| - |z|^2 / 2) lies at z = rho u along centre - h,
    where (A^2 + weight) rho^2 - A |centre - h| rho = weight (d - 1).
    """
    diffusion, value, d = GaussianDiffusion(3, size=4, eta=eta), bound(PosteriorMean(), Quadratic(CENTRE)), 4
    images = {"prompts": ["", "0.5", "-1"], "seeds": [3, 1, 4]}
    final = run(diffusion, NoiseOptimisation(100, 0.8, 0.7, clip=100.0, regularisation=weight), value, **images)
    found = final.context.trace.selections[-1].values[:, 1].double()  # the rewards of the last iterates
    plain = run(diffusion, Unguided(), value, **images)
    gain = diffusion.end(0)[0]
    for k in range(3):
        noise = torch.randn(1, 4, generator=torch.Generator().manual_seed(images["seeds"][k]), dtype=torch.float64)
        away = torch.tensor(CENTRE) - (plain.x[k].flatten() - gain * noise[0])
        q = float(away.norm())
        root = math.sqrt((gain * q) ** 2 + 4 * (gain**2 + weight) * weight * (d - 1))
        rho = (gain * q + root) / (2 * (gain**2 + weight))
        assert float(found[k]) == pytest.approx(-((gain * rho - q) ** 2) / 2, abs=1e-5)
    rewards = value.reward.score(final.images, final.prompts)
    assert (rewards >= found - 1e-6).all()  # the best of all iterates is returned


@pytest.mark.parametrize(
    ("sampler", "rescaled"),
    [
        (NoiseOptimisation(6, 0.8, 0.7, 0.5, 0.3), lambda c: NoiseOptimisation(6, 0.8 / c, 0.7, 0.5 * c, 0.3 * c)),
        (DPS(0.7), lambda c: DPS(0.7 / c)),
    ],
)
def test_settings_that_follow_the_unit_of_the_reward_give_the_same_images(sampler, rescaled):
    diffusion, c, images = GaussianDiffusion(3), 1000.0, {"prompts": ["", "0.5"], "seeds": [3, 1]}
    plain = run(diffusion, sampler, value_of(), **images).x
    torch.testing.assert_close(run(diffusion, rescaled(c), value_of([c * b for b in B]), **images).x, plain)
    assert (run(diffusion, sampler, value_of([c * b for b in B]), **images).x - plain).abs().max() > 0.1


def test_one_iteration_written_out_and_one_run_is_the_plain_chain():
    diffusion, value = GaussianDiffusion(2, size=2), value_of()
    plain = run(diffusion, Unguided(), value, 3)
    single = run(diffusion, NoiseOptimisation(1), value, 3)
    assert torch.equal(single.x, plain.x)
    assert single.context.trace.path_kl == 0
    z = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)])
    gain, b = diffusion.end(0)[0], torch.tensor([0.6, -0.8], dtype=torch.float64)
    shift, velocity = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(2):
        slope = gain * b + 0.05 * (1 / (z + shift).square().sum(1, keepdim=True) - 1) * (z + shift)
        slope = slope * (0.3 / slope.norm(dim=1, keepdim=True)).clamp(max=1)  # each image by its own norm
        velocity = 0.5 * velocity + slope
        shift = shift + 2.0 * (slope + 0.5 * velocity)
    found = run(diffusion, NoiseOptimisation(3, 2.0, 0.5, 0.3, 0.05), value, 3)
    torch.testing.assert_close(found.x.flatten(1), plain.x.flatten(1) + gain * shift)
    assert found.context.trace.path_kl is None


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_and_noise_in_the_steps_do_not_change_an_image(chunk_size):
    images = {"prompts": ["1", "", "-2"], "seeds": [3, 4, 5]}
    sampler, value = NoiseOptimisation(4), bound(PosteriorMean(), Quadratic(CENTRE))
    whole = run(GaussianDiffusion(3, size=4), sampler, value, **images)
    parts = run(GaussianDiffusion(3, size=4, chunk_size=chunk_size), sampler, value, **images)
    assert torch.equal(parts.x, whole.x)
    torch.testing.assert_close(parts.images, whole.images)


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_the_last_run_needs_no_backward_pass(iterations):
    cost = count(NoiseOptimisation(iterations), GaussianDiffusion(4), value_of())
    assert (cost.denoiser_rows, cost.gradient_rows) == (4 * iterations, 4 * (iterations - 1))
    assert cost.decoded_images == cost.reward_calls == iterations


def test_only_the_reward_needs_a_gradient():
    diffusion = GaussianDiffusion(2)
    message = "NoiseOptimisation needs gradients, and reward Compressibility is not differentiable"
    with pytest.raises(UserError, match=message):
        NoiseOptimisation().check(diffusion, bound(PosteriorMean(), Compressibility()))
    blind = bound(ExactSoftValue(1.0), Linear([1.0, 0.0]))
    blind.differentiable = False
    NoiseOptimisation().check(diffusion, blind)
    assert run(diffusion, NoiseOptimisation(2), blind, 2).done

    class Constant(Linear):
        def forward(self, images, prompts):
            return super().forward(images, prompts).detach()

    with pytest.raises(UserError, match="the value has no gradient at x"):
        run(diffusion, NoiseOptimisation(2), bound(PosteriorMean(), Constant([1.0, 0.0])), 1)
