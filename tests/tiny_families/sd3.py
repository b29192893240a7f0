"""Stable Diffusion 3 and 3.5 in small."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import clip_config, t5_tokenizer, tiny_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}


def save(folder: Path, version: str = "3.5", t5: bool = True, **scheduler: object) -> str:
    """Saves a pipeline; version 3.5 has normalised queries and keys and layers of dual attention, 3 has neither."""
    torch.manual_seed(0)
    newer, clip, second = version == "3.5", tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    encoder = T5Config(vocab_size=98, d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder.feed_forward_proj, encoder.is_gated_act, encoder.dense_act_fn = "gated-gelu", True, "gelu_new"
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=12,
            dual_attention_layers=(0,) if newer else (),
            qk_norm="rms_norm" if newer else None,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **scheduler}),
        vae=small_autoencoder(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second, 24, 12, "gelu")),
        tokenizer_2=second,
        text_encoder_3=T5EncoderModel(encoder) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return str(folder)
