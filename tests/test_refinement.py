"""Refinement against closed forms, and its start inside the chain."""

import math
from itertools import pairwise

import pytest
import torch

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import count
from svdd.samplers.dps import DPS
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.refinement import Refinement
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from tests.analytic import GaussianDiffusion, run
from tests.test_samplers import assert_mean, assert_variance, label, rewards, value_of


def autoregression(diffusion: GaussianDiffusion, i: int) -> tuple[float, float, float]:
    """Returns (phi, c, V) of a plain round from step i: each entry becomes N(phi x + c, V)."""
    gain, offset, variance = diffusion.end(i)
    return gain * math.sqrt(diffusion.signal[i]), offset, gain**2 * (1 - diffusion.signal[i]) + variance


@pytest.mark.parametrize(("strength", "alpha"), [(0.5, 1.0), (1.0, math.inf)])
def test_plain_rounds_with_acceptance_have_the_tilted_law(strength, alpha):
    """A plain round is a Gaussian autoregression, hence reversible; Barker's acceptance tilts its stationary law."""
    diffusion = GaussianDiffusion(4)
    phi, offset, variance = autoregression(diffusion, 4 - round(4 * strength))
    variance /= 1 - phi**2
    final = run(diffusion, Refinement(14, strength, alpha, Unguided()), value_of(), 1000)
    mean = offset / (1 - phi) * -0.2  # along b = (0.6, -0.8)
    assert_mean(rewards(final), mean + variance / alpha)
    assert_variance(rewards(final), variance)
    across = final.x.flatten(1) @ torch.tensor([0.8, 0.6], dtype=torch.float64)
    assert_mean(across, offset / (1 - phi) * 1.4)
    assert_variance(across, variance)


def test_a_round_without_candidates_is_a_plain_chain_from_the_noised_image():
    """The one round written out, of one image and of several: the noise to the level of step 2, then two steps."""
    diffusion = GaussianDiffusion(4)
    for seeds in ([5], [5, 8, 0]):
        images = run(diffusion, Refinement(1, sampler=Unguided()), value_of(), prompts=[""] * len(seeds), seeds=seeds)
        for seed, found in zip(seeds, images.x.flatten(1), strict=True):
            generator = torch.Generator().manual_seed(seed)
            draw = iter([torch.randn(1, 2, generator=generator, dtype=torch.float64) for _ in range(8)])
            first = next(draw)
            for i in range(4):
                factor, constant = diffusion.affine(i)
                first = factor * first + constant + diffusion.std(i) * next(draw)
            second = math.sqrt(diffusion.signal[2]) * first + math.sqrt(1 - diffusion.signal[2]) * next(draw)
            for i in (2, 3):
                factor, constant = diffusion.affine(i)
                second = factor * second + constant + diffusion.std(i) * next(draw)
            ends = torch.cat([first, second])
            torch.testing.assert_close(found, ends[(ends @ torch.tensor([0.6, -0.8], dtype=torch.float64)).argmax()])


@pytest.mark.parametrize("sampler", [SVDD(4), BestOfN(3), SMC(3), DPS(2.0)], ids=label)
def test_rewards_rise_from_round_to_round(sampler):
    final = run(GaussianDiffusion(5), Refinement(6, 0.6, sampler=sampler), value_of(), 100)
    rounds = [selection for selection in final.context.trace.selections if selection.values.shape[1] == 2]
    assert len(rounds) == 6
    chosen = [selection.values.gather(1, selection.kept)[:, 0] for selection in rounds]
    assert all((after >= before).all() for before, after in pairwise(chosen))
    torch.testing.assert_close(chosen[-1].double(), rewards(final), rtol=1e-5, atol=1e-5)
    assert float(chosen[-1].mean()) > float(rounds[0].values[:, 0].mean()) + 0.2
    assert final.context.trace.path_kl is None


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_a_round_costs_as_much_as_the_steps_that_it_repeats(steps, strength):
    repeated = max(1, round(strength * steps))
    found = count(Refinement(3, strength, sampler=SVDD(5)), GaussianDiffusion(steps), value_of())
    assert found.denoiser_rows == 1 + 5 * (steps - 1) + 3 * (1 + 5 * (repeated - 1))
    assert found.reward_calls == found.decoded_images == 5 * (steps + 3 * repeated)


def test_what_cannot_be_refined_is_refused():
    diffusion = GaussianDiffusion(4)
    for sampler, message in (
        (SMC(returns="all"), "Refinement refines one image per start, and SMC returned 8"),
        (RandomSearch(), "another sampler inside Refinement"),
    ):
        with pytest.raises(UserError, match=message):
            count(Refinement(sampler=sampler), diffusion, value_of())
    with pytest.raises(UserError, match="num_candidates=4 needs a chain with noise"):
        Refinement().check(GaussianDiffusion(4, eta=0.0), value_of())
    Refinement(sampler=BestOfN(4)).check(GaussianDiffusion(4, eta=0.0), value_of())
    assert Refinement(sampler=DPS()).needs_gradient
    assert not Refinement().needs_gradient

    class Backward(GaussianDiffusion):
        renoise = Diffusion.renoise

    with pytest.raises(UserError, match="Refinement noises finished images, and Backward has no `renoise`"):
        Refinement().check(Backward(4), value_of())
    with pytest.raises(UserError, match="Backward cannot noise an image, which Refinement needs: implement `renoise`"):
        run(Backward(4), Refinement(), value_of(), 1)
