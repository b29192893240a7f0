"""Tokenizers that split text into letters, of the classes that the published models use."""

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from tests.tiny_models import tiny_tokenizer

__all__ = ["CHAT_TEMPLATE", "clip_config", "qwen_tokenizer", "t5_tokenizer", "tiny_tokenizer"]

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (  # Qwen3's turns, without tools and reasoning
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def clip_config(tokenizer: CLIPTokenizer, width: int = 16, projection: int = 8, act: str = "quick_gelu"):
    """Returns the configuration of a CLIP text tower of two layers that reads 77 tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection,
        hidden_act=act,
    )


def t5_tokenizer(model_max_length: int = 512) -> T5TokenizerFast:
    """Returns a Unigram tokenizer whose ids 0 .. 2 are those of T5: padding, end of text, unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=model_max_length)


def qwen_tokenizer(model_max_length: int = 131072) -> Qwen2Tokenizer:
    """Returns a byte-level tokenizer with Qwen's special tokens and turns of a chat."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={word: k for k, word in enumerate(words + _SPECIAL)},
        merges=[],
        model_max_length=model_max_length,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=_SPECIAL,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
