"""Z-Image and Z-Image-Turbo in small."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import qwen_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}  # of Turbo


def save(folder: Path, **scheduler: object) -> str:
    """Saves a pipeline whose pad tokens are not zero, unlike those of a new network."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **scheduler}),
        vae=small_autoencoder(
            4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Qwen3Model(encoder),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return str(folder)
