import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

from svdd.diffusion.kernels import KERNELS, make_kernel
from tests.tiny_models import SD15_SCHEDULER

CASES = [
    (name, prediction, eta)
    for name, etas in (("ddim", (0.0, 0.3, 1.0)), ("ddpm", (1.0,)), ("euler_ancestral", (1.0,)))
    for prediction in ("epsilon", "v_prediction", "sample")
    for eta in etas
    if not (name == "euler_ancestral" and prediction == "sample")
]
CLASSES = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize(("name", "prediction", "eta"), CASES)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_draw_from_the_kernel_is_a_step_of_the_scheduler(name, prediction, eta, steps, clip_sample):
    config = SD15_SCHEDULER | {"prediction_type": prediction, "clip_sample": clip_sample}
    kernel = make_kernel(name, config, steps, eta)
    scheduler = CLASSES[name].from_config(config)
    scheduler.set_timesteps(steps)
    assert torch.equal(kernel.timesteps, scheduler.timesteps)
    torch.manual_seed(3)
    x = kernel.initial(torch.randn(2, 4, 8, 8))
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 8, 8)
        assert torch.equal(kernel.scale_input(x, i), scheduler.scale_model_input(x, t))
        denoised = kernel.predict(x, output, i)
        draw = [torch.Generator().manual_seed(9 * i + k) for k in range(2)]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in draw])
        draw = [torch.Generator().manual_seed(9 * i + k) for k in range(2)]
        options = {"eta": eta} if name == "ddim" else {}
        step = scheduler.step(output, t, x, generator=draw, **options)
        following = denoised.mean + kernel.std(i) * noise if kernel.std(i) > 0 else denoised.mean
        torch.testing.assert_close(denoised.x0, step.pred_original_sample, rtol=0, atol=0)
        # a clamp gives DDPM's last step noise of scale 1e-10; the kernel treats the step as deterministic
        torch.testing.assert_close(following, step.prev_sample, rtol=0, atol=1e-9 if name == "ddpm" else 0)
        x = step.prev_sample


def test_a_scheduler_without_a_gaussian_step_is_refused_with_a_list_of_supported_ones():
    with pytest.raises(ValueError, match=r"'pndm' has no Gaussian.*ddim, ddpm, euler_ancestral"):
        make_kernel("pndm", SD15_SCHEDULER, 10, 1.0)
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        make_kernel("dim", SD15_SCHEDULER, 10, 1.0)
    assert list(KERNELS) == ["ddim", "ddpm", "euler_ancestral"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type must be one of fixed_small, fixed_large"),
        ("euler_ancestral", {"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction"),
        ("ddim", {"prediction_type": "score"}, "prediction_type must be one of"),
    ],
)
def test_a_configuration_without_a_gaussian_step_is_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        make_kernel(name, SD15_SCHEDULER | config, 10, 1.0)
