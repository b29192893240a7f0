"""Sana in small."""

import inspect
import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

__all__ = ["SCHEDULER", "gemma_tokenizer", "save"]

SCHEDULER = {"num_train_timesteps": 1000, "flow_shift": 3.0, "use_flow_sigmas": True}
SCHEDULER |= {"prediction_type": "flow_prediction"}


def gemma_tokenizer() -> GemmaTokenizer:
    """Returns a tokenizer with Gemma's first ids that knows the words of the pipeline's instruction as one token each.

    It splits other words into parts of these and letters.
    """
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    first += [chr(code) for code in range(33, 127)]
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    learned = Tokenizer(BPE())
    learned.pre_tokenizer = Split("▁", "merged_with_next")
    learned.train_from_iterator(["▁".join(instruction).replace(" ", "▁")], BpeTrainer(show_progress=False))
    model = json.loads(learned.to_str())["model"]
    words = dict.fromkeys(first + list(model["vocab"]))
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=merges, add_bos_token=True)


def save(folder: Path, sample_size: int = 2, **scheduler: object) -> str:
    """Saves a pipeline; a sample size of 16, 32, 64 or 128 has a table of aspect ratios."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=8192,
        sliding_window=4096,
    )
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=sample_size,
        ),
        scheduler=DPMSolverMultistepScheduler(**{**SCHEDULER, **scheduler}),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(4, 4, 8, 8, 8, 8),
            decoder_block_out_channels=(4, 4, 8, 8, 8, 8),
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(encoder),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return str(folder)
