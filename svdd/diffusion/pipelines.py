"""Loads pipelines of diffusers from a folder or the hub, quietly, with one-line errors."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from svdd import UserError
from svdd.assets.hub import loading, locate

__all__ = ["load_pipeline", "warn_of_cuts"]

_MAX_TOKENS = 10_000


def load_pipeline(class_name: str, pretrained: str, lora: str | None, **options: Any) -> Any:
    """Returns a pipeline in float32, without a safety checker, with its LoRA weights loaded but not fused.

    Args:
        class_name: The class of diffusers that the model must have been saved from.
        pretrained: A folder or a hub name.
        lora: A folder, file or hub name of LoRA weights, or None.
        options: `revision`, `variant`, `local_files_only`.

    Raises:
        UserError: If the pipeline or the LoRA weights cannot be loaded, are incomplete, or belong to another class.
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
    if any(part.model_max_length > _MAX_TOKENS for name, part in pipeline.components.items() if "tokenizer" in name):
        raise UserError(f"pretrained={pretrained!r} has no usable tokenizer: its files are missing or incomplete")
    if lora is not None:
        if find_spec("peft") is None:
            raise UserError(f"lora={lora!r} needs the peft package: pip install 'svdd[lora]'")
        with loading(f"lora={lora!r}"):
            pipeline.load_lora_weights(lora)
    return pipeline


def warn_of_cuts(tokenizer: Any, texts: Sequence[str]) -> None:
    """Warns of each text that is longer than the text encoder reads, and names the words that are cut off."""
    limit = tokenizer.model_max_length
    for text in dict.fromkeys(texts):
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
            shown = text if len(text) <= 60 else text[:57] + "..."
            warnings.warn(
                f"a prompt has {len(ids)} tokens and the text encoder reads {limit}; cut off: {lost!r} "
                f"(prompt: {shown!r})",
                stacklevel=5,
            )


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
