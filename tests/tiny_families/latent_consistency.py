"""A latent consistency model of Stable Diffusion 1.5 in small."""

from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tests.tiny_models import SD15_SCHEDULER, save_tiny_pipeline

__all__ = ["save"]

SCHEDULER = {
    **{name: value for name, value in SD15_SCHEDULER.items() if name != "skip_prk_steps"},
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}


def save(folder: Path) -> str:
    """Saves a pipeline whose network takes the guidance scale as an input."""
    pipe = StableDiffusionPipeline.from_pretrained(save_tiny_pipeline(folder, "sd15"), safety_checker=None)
    torch.manual_seed(1)
    parts = pipe.components | {
        "unet": UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 16}),
        "scheduler": LCMScheduler(**SCHEDULER),
    }
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)
