"""Steps of flow models, and the transitions that all schedulers share."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from svdd.diffusion.kernels import DIFFUSION_KERNELS, FLOW_KERNELS
from svdd.diffusion.kernels.glass import glass
from svdd.diffusion.kernels.transition import Transition
from tests.tiny_models import SD15_SCHEDULER

FLOW = FLOW_KERNELS["euler"]
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHEDULES = {
    "plain": ({}, {}),
    "sd3": ({"shift": 3.0}, {}),
    "flux": (DYNAMIC | {"shift": 3.0}, {"mu": 0.83, "sigmas": np.linspace(1.0, 1 / 6, 6)}),
    "linear": (DYNAMIC | {"time_shift_type": "linear"}, {"mu": 1.7, "sigmas": np.linspace(1.0, 1 / 6, 6).tolist()}),
    "qwen": (DYNAMIC | {"shift_terminal": 0.02}, {"mu": 0.6, "sigmas": np.linspace(1.0, 1 / 6, 6)}),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_without_noise_and_with_fresh_noise_are_those_of_the_scheduler(schedule, dtype):
    config, options = SCHEDULES[schedule]
    for transition, stochastic in ((Transition(eta=0), False), (Transition("fresh"), True)):
        kernel = FLOW(config, 6, transition, options)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config | {"stochastic_sampling": stochastic})
        scheduler.set_timesteps(6, **options)
        assert torch.equal(kernel.timesteps, scheduler.timesteps)
        assert kernel.levels == [(1 - sigma, sigma) for sigma in scheduler.sigmas.tolist()]
        x = kernel.initial(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype))
        for i, t in enumerate(scheduler.timesteps):
            output = torch.randn(x.shape, generator=torch.Generator().manual_seed(9 + i)).to(dtype)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            step = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
            denoised, std = kernel.predict(x, output, i), kernel.std(i)
            assert (std > 0) == (stochastic and i < 5)
            if dtype == torch.bfloat16 and std > 0:
                x = step  # diffusers rounds the sum, and the kernel its mean
                continue
            assert torch.equal(denoised.mean + std * noise if std > 0 else denoised.mean, step)
            x = step


def test_a_scheduler_of_another_kind_is_refused_and_flow_sigmas_are_read():
    config = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction").config
    assert FLOW.settings(config)["shift"] == 3.0
    for other in (EDMEulerScheduler().config, SD15_SCHEDULER):
        with pytest.raises(ValueError, match="is not for flow matching"):
            FLOW.settings(other)
    for config, options, message in (
        ({"invert_sigmas": True}, {}, "invert_sigmas must be one of False, got True"),
        (DYNAMIC, {}, "needs mu"),
        ({}, {"sigmas": [1.0]}, "num_inference_steps=6 needs as many sigmas, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FLOW(config, 6, Transition(), options)
    with pytest.raises(ValueError, match=r"num_inference_steps=1 is too small.*not finite"):
        FLOW({"shift_terminal": 0.02}, 1)
    if find_spec("scipy") is None:
        with pytest.raises(ValueError, match="use_beta_sigmas=true needs scipy"):
            FLOW({"use_beta_sigmas": True}, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": "white"}, "noise must be one of posterior, cps, fresh, got 'white'"),
        ({"eta": 1.5}, "eta must lie in 0 .. 1, got 1.5"),
        ({"rho": -0.1}, "rho must lie in 0 .. 1"),
        ({"rho": math.nan}, "rho must lie in 0 .. 1"),
        ({"inner_steps": 0}, "inner_steps must be an integer >= 1, got 0"),
        ({"rho": 0.4, "eta": 0.5}, "rho=0.4 replaces the rule; leave out noise and eta"),
        ({"rho": 0.4, "noise": "cps"}, "rho=0.4 replaces the rule; leave out noise and eta"),
        ({"noise": "fresh", "eta": 0.5}, "noise=fresh does not depend on eta"),
        ({"inner_steps": 2, "eta": 0}, "inner_steps=2 needs steps with noise"),
    ],
)
def test_transitions_check_their_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transition(**arguments)


TRANSITIONS = [Transition(), Transition(eta=0.4), Transition("cps", 0.7), Transition("fresh"), Transition(rho=0.4)]
V = SD15_SCHEDULER | {"prediction_type": "v_prediction", "original_inference_steps": 50}
KERNELS = {name: (kernel, V) for name, kernel in DIFFUSION_KERNELS.items()}
KERNELS |= {f"flow-{name}": (kernel, {"shift": 3.0}) for name, kernel in FLOW_KERNELS.items()}


def correlation(name: str, transition: Transition, levels) -> float:
    """Returns rho by its definition."""
    (alpha, sigma), (alpha_next, sigma_next) = levels
    posterior = alpha * sigma_next / (alpha_next * sigma)
    rules = {"posterior": math.sqrt(1 - transition.eta**2 * (1 - posterior**2)), "fresh": 0.0}
    rules["cps"] = math.cos(transition.eta * math.pi / 2)
    if name.endswith("lcm") and transition == Transition():
        return 0.0
    return rules[transition.noise] if transition.rho is None else transition.rho


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_scheduler_takes_the_general_step(name, transition):
    """The law does not depend on whether it is written in the scheduler's arithmetic."""
    kernel_class, config = KERNELS[name]
    if name.endswith("lcm") and transition.eta == 0.4:
        return  # refused
    kernel = kernel_class(config, 10, transition)
    for i in range(9):
        x, output = torch.randn(2, 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        (alpha, sigma), (alpha_next, sigma_next) = kernel.levels[i : i + 2]
        x = x * math.hypot(alpha, sigma)
        found, rho = kernel.predict(x, output, i), correlation(name, transition, kernel.levels[i : i + 2])
        epsilon = (x - alpha * found.x0) / sigma
        tolerance = {"rtol": 2e-4, "atol": 2e-4 * math.hypot(alpha_next, sigma_next)}
        torch.testing.assert_close(found.mean, alpha_next * found.x0 + rho * sigma_next * epsilon, **tolerance)
        assert kernel.std(i) == pytest.approx(sigma_next * math.sqrt(1 - rho**2), rel=1e-4, abs=1e-6)
        still = alpha_next * found.x0 + sigma_next * epsilon
        torch.testing.assert_close(kernel.flow(x, found.x0, i), still, **tolerance)


@pytest.mark.parametrize("name", KERNELS)
def test_a_noised_image_is_at_the_level_that_the_steps_assume(name):
    """A network that knows the noise finds the image and that noise, and the step without noise keeps both."""
    kernel_class, config = KERNELS[name]
    for kernel in (kernel_class(config, 10), kernel_class(config, 1)):
        steps = len(kernel.timesteps)
        assert len(kernel.levels) == steps + 1
        x0, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        for i in range(steps):
            x = kernel.renoise(x0, noise, i)
            assert x.dtype == x0.dtype
            low, high = (kernel.split(x, torch.full_like(x, output), i)[0] for output in (0.0, 1.0))
            output = (x0 - low) / (high - low)  # x0 is affine in the network's output
            found, epsilon = kernel.split(x, output, i)
            close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, 1 / kernel.levels[i][1])}
            torch.testing.assert_close(found, x0, **close)
            if not name.endswith("lcm"):  # whose x0 is the consistency function
                torch.testing.assert_close(epsilon, noise, **close)
            torch.testing.assert_close(kernel.predict(x, output, i).x0, x0, **close)
            alpha, sigma = kernel.levels[i + 1]
            torch.testing.assert_close(kernel.flow(x, x0, i), alpha * x0 + sigma * noise, **close)
        half = kernel.renoise(x0.bfloat16(), noise.bfloat16(), 0)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), kernel.renoise(x0, noise, 0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", KERNELS)
def test_the_denoiser_between_two_steps_is_that_of_the_steps(name):
    """At the levels of the steps the network is told the same, and the posterior mean is the same."""
    kernel_class, config = KERNELS[name]
    kernel = kernel_class(config, 10)
    for i in range(1, 10):
        x, output = torch.randn(2, 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        (alpha, sigma), told = kernel.levels[i], []

        def network(x: torch.Tensor, t: torch.Tensor, told: list = told, output: torch.Tensor = output) -> torch.Tensor:
            told.extend([x, t])
            return output

        found = kernel.denoise(x / alpha, alpha / sigma, network)
        torch.testing.assert_close(found, kernel.predict(x, output, i).x0, rtol=1e-3, atol=1e-3 * (1 + sigma / alpha))
        torch.testing.assert_close(told[0], kernel.scale_input(x, i), rtol=1e-3, atol=1e-4)
        assert float(told[1]) == pytest.approx(float(kernel.timesteps[i]), abs=0.02)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral", "lcm"])
def test_coordinates_do_not_change_a_step_of_a_flow_model(name):
    """At equal levels the steps in the coordinates of a VP scheduler are those of the flow, also with inner steps."""
    glass_or_not = Transition(inner_steps=1 if name == "lcm" else 3)
    there = FLOW_KERNELS[name]({}, 12, glass_or_not)
    sigmas = [sigma / (alpha + sigma) for alpha, sigma in there.levels[:-1]]
    transition = Transition("fresh") if name == "lcm" else glass_or_not
    here = FLOW({}, 12, transition, {"sigmas": sigmas})
    assert sigmas[0] == pytest.approx(1, abs=3e-4)
    torch.testing.assert_close(there.timesteps, here.timesteps)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) + t / 1000

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, y = here.initial(noise), there.initial(noise)
    for i in range(12):
        torch.testing.assert_close(there.scale_input(y, i), x, rtol=1e-3, atol=1e-3)
        one, other = (
            kernel.predict(state, network(kernel.scale_input(state, i), kernel.timesteps[i]), i)
            for kernel, state in ((here, x), (there, y))
        )
        torch.testing.assert_close(one.x0, other.x0, rtol=1e-3, atol=1e-3)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1 + i))
        if here.std(i) > 0 and name != "lcm":
            x, y = glass(here, x, one.x0, noise, i, network), glass(there, y, other.x0, noise, i, network)
        else:
            x, y = one.mean + here.std(i) * noise, other.mean + there.std(i) * noise
    torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


def test_options_replace_settings_of_the_chain_whose_levels_a_flow_model_takes():
    saved = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    lcm, ddim = FLOW_KERNELS["lcm"], FLOW_KERNELS["ddim"]
    lcm.check_options({"original_inference_steps": 100})
    kernel = lcm(lcm.configure(saved, {"original_inference_steps": 100}), 4)
    chain = DIFFUSION_KERNELS["lcm"](V | {"original_inference_steps": 100, "rescale_betas_zero_snr": True}, 4)
    assert kernel.levels == chain.levels
    assert ddim(ddim.configure(saved, {}), 4).levels[0] == (0.0, 1.0)
    for options, message in (
        ({"shift": 2.0}, "no setting 'shift'"),
        ({"prediction_type": "sample"}, "predicts v alone"),
    ):
        with pytest.raises(ValueError, match=message):
            ddim.check_options(options)


def spread(transition: Transition, steps: int = 25) -> float:
    """Returns the standard deviation of the chain's end for data N(0, 1), whose denoiser is x0 = a x / (a^2 + s^2)."""
    kernel = FLOW({"shift": 3.0}, steps, transition, {"sigmas": 1 - np.arange(steps) / steps})
    variance = 1.0
    for i in range(steps):
        sigma = float(kernel.levels[i][1])
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        v = x * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)  # E[noise - x0 | x]
        variance = float(kernel.predict(x, v, i).mean) ** 2 * variance + kernel.std(i) ** 2
    return math.sqrt(variance)


def test_the_spread_of_a_chain_tells_the_transitions_apart():
    found = [
        spread(Transition(eta=0)),
        spread(Transition()),
        spread(Transition("cps", 0.7)),
        spread(Transition("fresh")),
    ]
    assert found == pytest.approx([0.9301, 0.8654, 0.7865, 0.6500], abs=6e-5)


def test_a_shift_that_leaves_the_range_of_levels_is_refused():
    with pytest.raises(ValueError, match=r"the scheduler's noise levels leave 0 \.\. 1: check its shift"):
        FLOW({"shift": -3.0}, 6, Transition(), {})
