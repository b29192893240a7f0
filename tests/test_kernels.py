import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.kernels.base import find_kernel
from svdd.diffusion.kernels.transition import Transition
from svdd.diffusion.kernels.vp import BetaKernel
from tests.tiny_models import SD15_SCHEDULER

ETAS = {"ddim": (0.0, 0.3, 1.0), "ddpm": (1.0,), "euler": (0.0,), "euler_ancestral": (1.0,), "lcm": (1.0,)}
CASES = [
    (name, prediction, eta)
    for name, etas in ETAS.items()
    for prediction in ("epsilon", "v_prediction", "sample")
    for eta in etas
    if not (name == "euler_ancestral" and prediction == "sample")
]
OWN = {"euler": Transition(eta=0)}  # the law that diffusers' scheduler draws, if it is not the default
CLASSES = {name: kernel.scheduler_class for name, kernel in DIFFUSION_KERNELS.items()}


def predicted(step) -> torch.Tensor:
    return step.denoised if hasattr(step, "denoised") else step.pred_original_sample


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize(("name", "prediction", "eta"), CASES)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_draw_from_the_kernel_is_a_step_of_the_scheduler(name, prediction, eta, steps, clip_sample):
    config = SD15_SCHEDULER | {"prediction_type": prediction, "clip_sample": clip_sample}
    kernel = DIFFUSION_KERNELS[name](config, steps, Transition(eta=eta))
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
        assert torch.equal(denoised.x0, predicted(step))
        # a clamp gives DDPM's last step noise of scale 1e-10; the kernel treats the step as deterministic
        torch.testing.assert_close(following, step.prev_sample, rtol=0, atol=1e-9 if name == "ddpm" else 0)
        x = step.prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear", "sigma_max": 10.0},
        {"timestep_type": "continuous", "sigma_min": 0.02, "use_karras_sigmas": True},
    ],
)
def test_euler_follows_every_spacing_of_sigma_of_its_scheduler(settings, spacing, prediction):
    config = SD15_SCHEDULER | settings | {"timestep_spacing": spacing, "prediction_type": prediction}
    for steps in (1, 7, 30):
        kernel = DIFFUSION_KERNELS["euler"](config, steps, Transition(eta=0))
        scheduler = CLASSES["euler"].from_config(config)
        scheduler.set_timesteps(steps)
        assert torch.equal(kernel.timesteps, scheduler.timesteps)
        assert kernel.levels == [(1.0, sigma) for sigma in scheduler.sigmas.tolist()[: steps + 1]]
        follow(kernel, scheduler)


def follow(kernel, scheduler, eta=1.0):
    """Runs chains of the kernel and compares each step with the scheduler's, unless that is not finite."""
    x = kernel.initial(torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(5)))
    for i, t in enumerate(kernel.timesteps):
        output = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(100 + i))
        assert torch.equal(kernel.scale_input(x, i), scheduler.scale_model_input(x, t))
        denoised, std = kernel.predict(x, output, i), kernel.std(i)
        noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(i))
        following = denoised.mean + std * noise if std > 0 else denoised.mean
        assert all(part.isfinite().all() for part in (*denoised, following, kernel.flow(x, denoised.x0, i)))
        options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
        step = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i), **options)
        if step.prev_sample.isfinite().all():
            assert torch.equal(denoised.x0, predicted(step))
            tolerance = 1e-9 if isinstance(scheduler, DDPMScheduler) else 0  # as above
            torch.testing.assert_close(following, step.prev_sample, rtol=0, atol=tolerance)
        x = following


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "prediction", "eta"), CASES)
def test_steps_at_zero_terminal_snr_are_finite_or_refused(name, prediction, eta, spacing):
    """DDIM's 1 - a' - std^2 rounds to a negative number at T = 3 and 25; with trailing spacing diffusers adds a step at
    timestep -1 at T = 61."""
    config = SD15_SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": prediction}
    config["original_inference_steps"] = 100
    for steps in (2, 3, 25, 61):
        config["timestep_spacing"] = spacing
        if prediction == "epsilon" and (spacing != "leading" or name == "lcm") and not name.startswith("euler"):
            with pytest.raises(ValueError, match="prediction_type=epsilon divides by zero at timestep 999"):
                DIFFUSION_KERNELS[name](config, steps, Transition(eta=eta))
            continue
        scheduler = CLASSES[name].from_config(config)
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) > steps and name.startswith("euler"):
            scheduler.sigmas[steps] = 0  # where the surplus step would have arrived
        kernel = DIFFUSION_KERNELS[name](config, steps, Transition(eta=eta))
        assert len(kernel.timesteps) == steps
        follow(kernel, scheduler, eta)


@pytest.mark.parametrize("name", [name for name in DIFFUSION_KERNELS if name != "lcm"])
def test_as_many_steps_as_training_steps_are_refused_in_one_line_or_run(name):
    message = "num_inference_steps=1000 is too large for a model that was trained on 1000 timesteps; use at most 999"
    with pytest.raises(ValueError, match=message):
        DIFFUSION_KERNELS[name](SD15_SCHEDULER | {"timestep_spacing": "leading"}, 1000)
    with pytest.raises(ValueError, match="num_inference_steps=1001 is too large"):
        DIFFUSION_KERNELS[name](SD15_SCHEDULER | {"timestep_spacing": "trailing"}, 1001)
    assert len(DIFFUSION_KERNELS[name](SD15_SCHEDULER | {"timestep_spacing": "trailing"}, 1000).timesteps) == 1000


def test_lcm_chooses_among_the_steps_of_its_distillation():
    kernel = DIFFUSION_KERNELS["lcm"](SD15_SCHEDULER, 4, Transition(), {"original_inference_steps": 100})
    scheduler = CLASSES["lcm"].from_config(SD15_SCHEDULER)
    scheduler.set_timesteps(4, original_inference_steps=100)
    assert torch.equal(kernel.timesteps, scheduler.timesteps)
    follow(kernel, scheduler)
    for transition in (Transition(eta=0.5), Transition(inner_steps=2)):
        with pytest.raises(ValueError, match="lcm"):
            DIFFUSION_KERNELS["lcm"](SD15_SCHEDULER, 4, transition)


# ---- saved by another class

SAVED = ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LCM", "TCD")
SAVED += ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
SAVED += ("KDPM2Discrete", "KDPM2AncestralDiscrete")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def saved(kind: str, folder, **settings):
    """Returns a scheduler written and read by its own class, with its defaults but for the settings that it knows."""
    scheduler_class = getattr(diffusers, f"{kind}Scheduler")
    known = scheduler_class._get_init_keys(scheduler_class)
    own = {name: value for name, value in settings.items() if name in known}
    scheduler_class(**BETAS, **own).save_pretrained(folder)
    return scheduler_class.from_pretrained(folder)


def pipeline_with(scheduler) -> StableDiffusionPipeline:
    class Autoencoder:  # the constructor reads nothing else
        config = type("", (), {"block_out_channels": (1,) * 4})

    parts = dict.fromkeys(("text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(vae=Autoencoder(), scheduler=scheduler, **parts, requires_safety_checker=False)


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_karras_sigmas": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ],
    ids=["defaults", "karras", "zero_snr"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_configuration_that_any_class_saved_gives_the_pipelines_chain(kind, settings, tmp_path):
    """The reference is a `StableDiffusionPipeline` whose constructor received the chosen scheduler."""
    original = pipeline_with(saved(kind, tmp_path, **settings)).scheduler.config
    unsaid = {} if "set_alpha_to_one" in original else {"set_alpha_to_one": False}
    for name, scheduler_class in CLASSES.items():
        scheduler = pipeline_with(scheduler_class.from_config(original, **unsaid)).scheduler
        scheduler.set_timesteps(7)
        kernel = DIFFUSION_KERNELS[name](BetaKernel.settings(original), 7, OWN.get(name, Transition()))
        assert kernel.config.get("clip_sample", False) is False
        assert (kernel.timesteps == scheduler.timesteps).all()
        follow(kernel, scheduler)


@pytest.mark.parametrize("kind", SAVED)
def test_the_class_that_saved_a_model_does_not_change_its_chain(kind, tmp_path):
    """Models that differ in the class of their scheduler alone draw the same."""
    settings = {"timestep_spacing": "leading", "prediction_type": "v_prediction", "set_alpha_to_one": False}
    configs = [BetaKernel.settings(saved(each, tmp_path, **settings).config) for each in ("PNDM", kind)]
    x = output = torch.ones(1, 1, 1, 1)
    for name in DIFFUSION_KERNELS:
        if kind == "DPMSolverSinglestep" and name.startswith("euler"):
            continue  # the one has no timestep_spacing, the other has another default than DDIM
        one, other = (DIFFUSION_KERNELS[name](config, 7, OWN.get(name, Transition())) for config in configs)
        for i in range(7):
            assert one.std(i) == other.std(i)
            assert torch.equal(one.predict(x, output, i).mean, other.predict(x, output, i).mean)


@pytest.mark.parametrize("kind", ["EDMEuler", "FlowMatchEulerDiscrete"])
def test_a_scheduler_without_betas_is_refused(kind):
    config = getattr(diffusers, f"{kind}Scheduler")().config
    with pytest.raises(ValueError, match="has no beta_schedule"):
        BetaKernel.settings(config)


def test_a_scheduler_without_a_gaussian_step_is_refused_with_a_list_of_supported_ones():
    with pytest.raises(ValueError, match=r"'pndm' has no Gaussian.*ddim, ddpm, euler, euler_ancestral, lcm"):
        find_kernel("pndm", DIFFUSION_KERNELS)
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        find_kernel("dim", DIFFUSION_KERNELS)
    assert list(DIFFUSION_KERNELS) == ["ddim", "ddpm", "euler", "euler_ancestral", "lcm"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type must be one of fixed_small, fixed_large"),
        ("euler_ancestral", {"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction"),
        ("lcm", {"original_inference_steps": 8}, "num_inference_steps=10 is too large.*original_inference_steps=8"),
        ("ddim", {"prediction_type": "score"}, "prediction_type must be one of"),
        ("ddim", {"timestep_spacing": "karras"}, "timestep_spacing must be one of leading, trailing, linspace"),
        ("ddim", {"beta_schedule": "laplace"}, "DDIMScheduler does not know beta_schedule='laplace'"),
        ("ddim", {"beta_start": 0.0, "timestep_spacing": "linspace"}, "divides by zero at timestep 0"),
    ],
)
def test_a_configuration_without_a_gaussian_step_is_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        DIFFUSION_KERNELS[name](SD15_SCHEDULER | config, 10)
