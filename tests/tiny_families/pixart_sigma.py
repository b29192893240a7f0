"""PixArt-Sigma in small."""

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny_families.autoencoder import small_autoencoder
from tests.tiny_families.tokenizers import t5_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}


def save(folder: Path, sample_size: int = 8, **transformer: object) -> str:
    """Saves a pipeline; one of a `sample_size` of 32, 64, 128 or 256 draws at the sizes of its training alone."""
    torch.manual_seed(0)
    encoder = T5Config(vocab_size=98, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder.feed_forward_proj, encoder.is_gated_act, encoder.dense_act_fn = "gated-gelu", True, "gelu_new"
    settings = {
        "sample_size": sample_size,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    }
    PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(300),
        text_encoder=T5EncoderModel(encoder),
        vae=small_autoencoder(
            4,
            scaling_factor=0.13025,
        ),
        transformer=PixArtTransformer2DModel(**{**settings, **transformer}),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
    ).save_pretrained(folder)
    return str(folder)
