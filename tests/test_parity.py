"""`Unguided` and one-candidate SVDD equal `StableDiffusionPipeline` bit for bit."""

import json
import shutil
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging

from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.preview import Preview
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

logging.set_verbosity_error()
PROMPTS = ["red apple", "blue car", "panda", "house on a green background"]
SEEDS = [11, 5, 2**40, 0]
CLASSES = {name: kernel.scheduler_class for name, kernel in DIFFUSION_KERNELS.items()}


def by_hand(
    folder, scheduler, prompts, seeds, steps, guidance_scale, eta, negative_prompt=None, unsaid=None
) -> np.ndarray:
    """Draws with the pipeline and the scheduler; with `unsaid` settings the constructor receives the scheduler."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    chosen = CLASSES[scheduler].from_config(pipeline.scheduler.config, **unsaid or {})
    if unsaid is not None:
        parts = pipeline.components | {"scheduler": chosen}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.scheduler = chosen
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        eta=eta,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images


def ours(folder, sampler, scheduler, prompts, seeds, steps, guidance_scale, eta, negatives=None) -> np.ndarray:
    diffusion = StableDiffusion(folder, steps, guidance_scale, eta, scheduler, parity=True)
    value = PosteriorMean()
    value.bind(Compressibility(), diffusion)
    with torch.no_grad():
        final = sampler(Start(diffusion, prompts, seeds, negatives), value)
        return final.images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("sampler", [Unguided(), SVDD(num_candidates=1), SVDD(1, alpha=0.5), BestOfN(1)])
@pytest.mark.parametrize("count", [1, 4])
def test_the_embedded_model_equals_the_pipeline(sampler, count):
    from importlib.resources import files

    folder = str(files("svdd") / "assets" / "emoji-sd")
    arguments = (PROMPTS[:count], SEEDS[:count], 6, 4.0, 1.0)
    assert np.array_equal(by_hand(folder, "ddim", *arguments), ours("emoji", sampler, "ddim", *arguments))


@pytest.mark.parametrize("folder", ["sd15", "sd21"])
@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "eta"),
    [
        ("ddim", 7.5, 1.0),
        ("ddim", 7.5, 0.0),
        ("ddim", 1.0, 0.5),
        ("ddpm", 3.0, 1.0),
        ("euler_ancestral", 7.5, 1.0),
        ("euler", 5.0, 0.0),
        ("lcm", 2.0, 1.0),
    ],
)
def test_real_layouts_equal_the_pipeline(folder, scheduler, guidance_scale, eta, request):
    path = request.getfixturevalue(folder)
    arguments = (PROMPTS, SEEDS, 5, guidance_scale, eta)
    assert np.array_equal(by_hand(path, scheduler, *arguments), ours(path, Unguided(), scheduler, *arguments))


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("EulerDiscrete", "ddim"), ("DPMSolverMultistep", "ddpm"), ("UniPCMultistep", "euler_ancestral")],
)
def test_a_model_saved_with_another_scheduler_equals_the_pipeline(kind, scheduler, sd15, tmp_path):
    """Such configurations have no `clip_sample`, and DDIMScheduler and DDPMScheduler would clip the latents."""
    folder = str(shutil.copytree(sd15, tmp_path / "model"))
    name = f"{kind}Scheduler"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    getattr(diffusers, name)(**betas).save_pretrained(f"{folder}/scheduler")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    arguments = (PROMPTS[:2], SEEDS[:2], 4, 3.0, 1.0)
    expected = by_hand(folder, scheduler, *arguments, unsaid={"set_alpha_to_one": False})
    assert np.array_equal(expected, ours(folder, Unguided(), scheduler, *arguments))


def test_negative_prompts_equal_the_pipeline(sd15):
    negatives = ["blurry", "", "red", "dark"]
    arguments = (PROMPTS, SEEDS, 4, 7.5, 1.0)
    expected = by_hand(sd15, "ddim", *arguments, negative_prompt=negatives)
    assert np.array_equal(expected, ours(sd15, Unguided(), "ddim", *arguments, negatives))
    assert not np.array_equal(expected, ours(sd15, Unguided(), "ddim", *arguments))


@pytest.mark.parametrize("count", [1, 3])
def test_textual_inversions_of_several_vectors_equal_the_pipeline(sd15, tmp_path, count):
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    vectors = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    pipeline.load_textual_inversion({"<toy>": vectors if count > 1 else vectors[0]})
    pipeline.save_pretrained(tmp_path)
    prompts, negatives = ["<toy> on a box", "a <toy>, a <toy>", "apple", "<toy>"], ["", "<toy>", "blurry", ""]
    arguments = (prompts, SEEDS, 3, 5.0, 1.0)
    expected = by_hand(tmp_path, "ddim", *arguments, negative_prompt=negatives)
    assert np.array_equal(expected, ours(str(tmp_path), Unguided(), "ddim", *arguments, negatives))
    with pytest.warns(UserWarning, match=rf"a prompt has {2 + 26 * count} tokens") if count > 2 else nullcontext():
        StableDiffusion(str(tmp_path), 1).encode(["<toy> " * 26], [None])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_a_network_with_a_guidance_embedding_equals_the_pipeline(sd15, tmp_path, guidance_scale):
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config({**pipeline.unet.config, "time_cond_proj_dim": 33})
    pipeline.register_modules(unet=network)
    pipeline.save_pretrained(tmp_path)
    arguments = (PROMPTS, SEEDS, 3, guidance_scale, 1.0)
    assert np.array_equal(by_hand(tmp_path, "ddim", *arguments), ours(str(tmp_path), Unguided(), "ddim", *arguments))
    diffusion = StableDiffusion(str(tmp_path), 3, guidance_scale)
    with torch.no_grad():
        start = Start(diffusion, PROMPTS, SEEDS)
        final = Unguided()(start, PosteriorMean())
        x, row = final.x, torch.arange(4)
        previews = [
            diffusion.preview(x, 1, start.context.conditioning, row, Preview(scale), {}) for scale in (1.0, 9.0)
        ]
    assert start.context.ledger.network_rows == start.context.ledger.denoiser_rows == 3 * 4
    assert not torch.equal(*previews)
