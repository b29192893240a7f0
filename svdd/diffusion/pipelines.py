"""Loads pipelines and decoders of diffusers from a folder or the hub, quietly, with one-line errors."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import loading, locate

__all__ = ["TinyDecoder", "fingerprint", "load_pipeline", "to_images", "warn_of_cuts"]


def load_pipeline(class_name: str, pretrained: str, lora: str | None, **options: Any) -> Any:
    """Returns a pipeline in float32, without a safety checker, with its LoRA weights loaded but not fused.

    The options are `revision`, `variant` and `local_files_only`. UserError if the model or the LoRA weights cannot be
    loaded, are incomplete, or belong to another class of pipeline.
    """
    import diffusers

    expected = (
        f"`emoji`, a folder saved by {class_name}.save_pretrained (for a single file, call from_single_file first), or "
        "a hub name such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    source = locate("pretrained", pretrained, "model_index.json", expected)
    with loading(f"pretrained={pretrained!r}"), _quiet():
        index = diffusers.DiffusionPipeline.load_config(source, **{k: v for k, v in options.items() if k != "variant"})
        if index["_class_name"] != class_name:
            raise UserError(f"pretrained={pretrained!r} is a {index['_class_name']}; this class takes a {class_name}")
        pipeline = getattr(diffusers, class_name).from_pretrained(
            source, safety_checker=None, feature_extractor=None, dtype=torch.float32, **options
        )
    # For missing files transformers builds an empty tokenizer without a length limit.
    if any(part.model_max_length > 10_000 for name, part in pipeline.components.items() if "tokenizer" in name):
        raise UserError(f"pretrained={pretrained!r} has no usable tokenizer: its files are missing or incomplete")
    if lora is not None:
        if find_spec("peft") is None:
            raise UserError(f"lora={lora!r} needs the peft package: pip install 'svdd[lora]'")
        with loading(f"lora={lora!r}"):
            pipeline.load_lora_weights(lora)
    return pipeline


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny (TAESD) in a folder or on the hub; UserError if it does not fit the latents."""

    def __init__(self, source: str, latent_channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        expected = "`tiny`, a folder written by AutoencoderTiny.save_pretrained, or a hub name: madebyollin/taesd"
        with loading(f"decoder={source!r}"):
            vae = AutoencoderTiny.from_pretrained(locate("decoder", source, "config.json", expected), torch_dtype=dtype)
        if (found := vae.config.latent_channels) != latent_channels:
            raise UserError(f"decoder={source!r} is for latents of {found} channels; this model has {latent_channels}")
        self.decoder, self.scaling_factor = vae.decoder.eval(), float(vae.config.scaling_factor)

    def forward(self, x0: Tensor) -> Tensor:
        """Turns latents [n, c, h, w] into images, float32 [n, 3, H, W] in [0, 1]."""
        images = self.decoder(x0.to(next(self.parameters()).dtype) / self.scaling_factor)
        return to_images(images)


def to_images(decoded: Tensor) -> Tensor:
    """Turns a decoder's output in [-1, 1] into images, float32 in [0, 1]; infinity becomes NaN, which stays NaN."""
    return (decoded.nan_to_num(torch.nan, torch.nan, torch.nan) * 0.5 + 0.5).clamp(0, 1).float()


def fingerprint(*modules: nn.Module) -> str:
    """Returns a hash of some numbers of every parameter, in half precision, so a model's fp16 files have the same."""
    found = hashlib.sha256()
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        flat = parameter.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)]
        found.update(name.encode() + few.to("cpu", torch.float16).numpy().tobytes())
    return found.hexdigest()[:12]


def warn_of_cuts(tokenizer: Any, texts: Sequence[str]) -> None:
    """Warns of each text that is longer than the text encoder reads, and names the words that are cut off."""
    limit = tokenizer.model_max_length
    for text in dict.fromkeys(texts):
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
            where = f"cut off: {lost!r} (prompt: {text if len(text) <= 60 else text[:57] + '...'!r})"
            warnings.warn(f"a prompt has {len(ids)} tokens and the text encoder reads {limit}; {where}", stacklevel=5)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides loading bars and the notice about the missing safety checker."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore:
        restore.callback(diffusers_logging.set_verbosity, diffusers_logging.get_verbosity())
        diffusers_logging.set_verbosity_error()
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                restore.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
