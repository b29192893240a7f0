"""FLUX.1 dev and schnell in small."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import clip_config, t5_tokenizer, tiny_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
SCHEDULER |= {"max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}


def save(folder: Path, version: str = "dev", **scheduler: object) -> str:
    """Saves a pipeline; `dev` has a guidance embedding and dynamic shifting, `schnell` has neither."""
    torch.manual_seed(0)
    clip, dev = tiny_tokenizer(), version == "dev"
    encoder = T5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder.feed_forward_proj, encoder.is_gated_act, encoder.dense_act_fn = "gated-gelu", True, "gelu_new"
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{**SCHEDULER, **({} if dev else {"shift": 1.0, "use_dynamic_shifting": False}), **scheduler}
        ),
        vae=small_autoencoder(
            16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(encoder),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return str(folder)
