"""Qwen-Image in small."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny_families.tokenizers import qwen_tokenizer

__all__ = ["SCHEDULER", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5}
SCHEDULER |= {"max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02, "use_dynamic_shifting": True}
SCHEDULER |= {"time_shift_type": "exponential"}


def save(folder: Path, **scheduler: object) -> str:
    """Saves a pipeline, the vision tower of its text encoder included."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128000}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0}
    text |= {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    encoder = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"fullatt_block_indexes": [0]},
        image_token_id=ids[0],  # never in a prompt
        video_token_id=ids[0],
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        tie_word_embeddings=False,
    )
    channels = 4
    QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **scheduler}),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=channels,
            num_res_blocks=1,
            latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
            latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return str(folder)
