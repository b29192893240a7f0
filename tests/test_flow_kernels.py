"""Steps of flow models, and the transitions that all schedulers share."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from svdd.diffusion.kernels import DIFFUSION_KERNELS, FLOW_KERNELS
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


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("name", [*DIFFUSION_KERNELS, "flow"])
def test_every_scheduler_takes_the_general_step(name, transition):
    """The law does not depend on whether it is written in the scheduler's arithmetic."""
    config = {"shift": 3.0} if name == "flow" else SD15_SCHEDULER | {"prediction_type": "v_prediction"}
    kernel = (FLOW if name == "flow" else DIFFUSION_KERNELS[name])(config, 10, transition)
    for i in range(9):
        x, output = torch.randn(2, 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        (alpha, sigma), (alpha_next, sigma_next) = kernel.levels[i : i + 2]
        x = x * math.hypot(alpha, sigma)
        found = kernel.predict(x, output, i)
        epsilon = (x - alpha * found.x0) / sigma
        rho = transition.correlation((alpha, sigma), (alpha_next, sigma_next))
        tolerance = {"rtol": 2e-4, "atol": 2e-4}
        torch.testing.assert_close(found.mean, alpha_next * found.x0 + rho * sigma_next * epsilon, **tolerance)
        assert kernel.std(i) == pytest.approx(sigma_next * math.sqrt(1 - rho**2), rel=1e-4, abs=1e-6)
        still = alpha_next * found.x0 + sigma_next * epsilon
        torch.testing.assert_close(kernel.flow(x, found.x0, i), still, **tolerance)


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
