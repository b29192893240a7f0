"""FLUX.2 klein, base and distilled, in small."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny_families.tokenizers import qwen_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
SCHEDULER |= {"max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": "exponential"}


def save(folder: Path, version: str = "base", **scheduler: object) -> str:
    """Saves a pipeline, `base` or `distilled`; the text encoder has the 27 layers whose states are read."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=32, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **scheduler}),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(encoder),
        tokenizer=tokenizer,
        is_distilled=version == "distilled",
    ).save_pretrained(folder)
    return str(folder)
