"""Stable Diffusion XL in small."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import clip_config, tiny_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
    # the published file has keys that the class does not know
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}


def save(folder: Path, guidance_embedding: int | None = None, zeros: bool = True, vae: dict | None = None) -> str:
    """Saves a pipeline.

    Args:
        folder: Where to.
        guidance_embedding: Width of the embedding of the guidance scale in the UNet of a latent consistency model.
        zeros: Whether the unconditional embeddings are zeros if there is no negative prompt.
        vae: Other settings of the autoencoder.
    """
    torch.manual_seed(0)
    tokenizer, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    StableDiffusionXLPipeline(
        vae=small_autoencoder(
            4,
            **{"scaling_factor": 0.13025, "force_upcast": True, **(vae or {})},
        ),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second, 24, 12, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=40,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
            time_cond_proj_dim=guidance_embedding,
        ),
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)
