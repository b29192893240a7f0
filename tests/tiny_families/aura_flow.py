"""AuraFlow in small, for the example of a model family in docs/how_to/extending.md."""

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import t5_tokenizer

__all__ = ["save"]


def save(folder: Path) -> str:
    """Saves a pipeline."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    config = UMT5Config(vocab_size=98, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=small_autoencoder(
            4,
            scaling_factor=0.13025,
        ),
        text_encoder=UMT5EncoderModel(config),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return str(folder)
