"""CLIP models from transformers and open_clip behind one interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import (
    ASSETS,
    fit_weights,
    loading,
    locate,
    offline,
    read_auto,
    read_model,
    read_tokenizer,
    read_weights,
    unreachable,
)
from svdd.rewards.base import full_precision
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, fit_square, normalise, smooth_image, to_pil

__all__ = ["EMBEDDED", "ClipModel", "OpenClipModel", "TransformersClip", "colour_statistics", "read_clip"]

EMBEDDED = {"emoji": "emoji-clip", "emoji-judge": "emoji-judge"}


class ClipModel(nn.Module, ABC):
    """An image encoder and a text encoder with a common embedding space."""

    side: int  # width and height of the images that it reads
    mean: Sequence[float]  # of each colour, for normalisation
    std: Sequence[float]
    whole, mode, rounded = False, "bicubic", False  # as in fit_square
    from_files = ("side", "mean", "std", "whole", "mode")

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Drops the cached embeddings of texts, whose last bits depend on the texts that were encoded together."""
        self._texts.clear()

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, truncated to the model's context, [n, d]."""

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.text_features([""]).shape[-1])

    def preprocess(self, images: Tensor) -> Tensor:
        """Resizes, crops and normalises images as the model's own processor does."""
        return normalise(fit_square(images, self.side, self.whole, self.mode, self.rounded), self.mean, self.std)

    @full_precision()
    def image_features(self, images: Tensor) -> Tensor:
        """Returns the embeddings, of length 1, float32 [n, d], of images, float [n, 3, h, w] in [0, 1]."""
        pixels = self.preprocess(images).to(next(self.parameters()).dtype)
        return F.normalize(self.encode_images(pixels).float(), dim=-1)

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the cosine similarity of each image with its own text, float32 [n]."""
        features = self.image_features(images)
        return (features * self.text_features(texts).to(features)).sum(-1)

    @full_precision()
    @torch.inference_mode(False)  # cached features are used in gradients later
    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns the embedding of each text, of length 1, float32 [n, d]; thousands are cached."""
        texts = [str(text) for text in texts]  # without columns
        if len(self._texts.keys() | set(texts)) > 4096:
            self._texts.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            features = F.normalize(self.encode_texts(new).float(), dim=-1)
            self._texts.update(zip(new, features, strict=True))
        device = next(self.parameters()).device
        return torch.stack([self._texts[text].to(device) for text in texts])


class TransformersClip(ClipModel):
    """A CLIP in the format of transformers; its tokenizer and image processor may come from another `processor`."""

    def __init__(self, pretrained: str, options: dict[str, Any], processor: str | None = None) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer

        self.clip, source, own = read_clip(CLIPModel, pretrained, options)
        if processor is not None:
            expected, local = "the folder of a CLIP or a hub name", bool(options.get("local_files_only"))
            source, own = locate(f"processor={processor!r}", processor, "config.json", expected, None, local)
        words = self.clip.config.text_config.vocab_size
        self.tokenizer = read_tokenizer(CLIPTokenizer, source, f"the tokenizer of {source!r}", words, **own)
        self.side = int(self.clip.config.vision_config.image_size)
        self.scale: float = self.clip.logit_scale.exp().item()  # read before the weights lose precision
        self.mean, self.std = colour_statistics(source, own, self.side)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""
        return self.clip.get_image_features(pixel_values=pixels).pooler_output

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, truncated to the model's context, [n, d]."""
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.clip.device)
        return self.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output


class OpenClipModel(ClipModel):
    """A CLIP of open_clip; the arguments are those of `CLIPScore`. Raises UserError if names or weights do not fit."""

    rounded = True

    def __init__(self, architecture: str, pretrained: str, local_files_only: bool = False) -> None:
        super().__init__()
        import open_clip
        from open_clip.transform import PreprocessCfg

        includes_weights = architecture.startswith(("hf-hub:", "local-dir:"))
        if not includes_weights and architecture not in open_clip.list_models():
            raise UserError(f"open_clip has no model {architecture!r}; `open_clip.list_models()` lists them")
        file = Path(pretrained).expanduser()
        own_file = file.is_file() and not includes_weights
        tag = None if own_file or includes_weights else pretrained
        if tag and tag not in (tags := open_clip.list_pretrained_tags_by_model(architecture)):
            known = ", ".join(tags) or "none"
            raise UserError(f"open_clip has no weights {tag!r} for {architecture}; known: {known}; or a weights file")
        if tag and local_files_only and not open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub"):
            problem = f"open_clip downloads {tag!r} for {architecture} from outside the hub"
            raise UserError(f"{problem}, so local_files_only cannot be kept; give a weights file")
        down = "" if local_files_only or own_file or architecture.startswith("local-dir:") else unreachable()
        with loading(f"{architecture!r} of open_clip", down=down), offline(local_files_only or bool(down)), _no_code():
            self.clip = open_clip.create_model(architecture, tag, load_weights=not own_file, precision="fp32")
            self.tokenizer = open_clip.get_tokenizer(architecture)
        if own_file:
            fit_weights(self.clip, read_weights(file), str(file))
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.clip))
        size, resize = config.size, config.resize_mode
        sides = {size} if isinstance(size, int) else set(size)
        if resize not in ("shortest", "squash") or len(sides) > 1:
            found = f"{architecture!r} of open_clip prepares images of size {size} with resize_mode {resize!r}"
            raise UserError(f"{found}, which svdd does not implement; expected a square, and shortest or squash")
        self.side, self.whole = int(sides.pop()), resize == "squash"
        self.mean, self.std = config.mean, config.std
        self.mode = "bilinear" if config.interpolation == "bilinear" else "bicubic"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""
        return self.clip.encode_image(pixels)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, truncated to the model's context, [n, d]."""
        return self.clip.encode_text(self.tokenizer(texts).to(next(self.clip.parameters()).device))


@contextmanager
def _no_code() -> Iterator[None]:
    """Refuses code in models, where `trust_remote_code` cannot be passed on and transformers would ask a user."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def read_clip(
    auto: Any, pretrained: str, options: dict[str, Any], spare: str = r"position_ids$"
) -> tuple[Any, str, dict[str, Any]]:
    """Returns a CLIP of transformers in float32, and the source and options of its other parts, or raises UserError."""
    from transformers import AutoConfig

    what, expected = f"pretrained={pretrained!r}", "`emoji`, `emoji-judge`, a folder saved by CLIPModel.save_pretrained"
    if pretrained in EMBEDDED:
        source, options = str(ASSETS / EMBEDDED[pretrained]), {"local_files_only": True}
    else:
        expected += ", or a hub name such as openai/clip-vit-large-patch14"
        source, options = locate(what, pretrained, "config.json", expected, **options)
    if (kind := read_auto(AutoConfig, source, what, **options).model_type) != "clip":
        raise UserError(f"{what} is a {kind} model; expected a CLIP")
    return read_model(auto, source, torch.float32, what, spare, **options), source, options


def colour_statistics(source: str, options: dict[str, Any], side: int) -> tuple[Sequence[float], Sequence[float]]:
    """Returns mean and standard deviation of the colours; OpenAI's if there is no preprocessor_config.json.

    Raises:
        UserError: If that file cannot be read, or asks for something else than a central square of `side` pixels.
    """
    from transformers import CLIPImageProcessor

    what = f"the image processor of {source!r}"
    with loading(what, source):
        try:
            processor = CLIPImageProcessor.from_pretrained(source, trust_remote_code=False, **options)
        except OSError:
            if any((Path(source) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
                raise
            return CLIP_MEAN, CLIP_STD
        image = smooth_image(96, 64)
        theirs = processor(images=to_pil(image), return_tensors="pt").pixel_values
    ours = normalise(fit_square(image, side), processor.image_mean, processor.image_std)
    if theirs.shape != ours.shape or (theirs - ours).abs().max() * min(processor.image_std) > 3 / 255:
        asked = f"size {dict(processor.size)}, crop_size {dict(processor.crop_size)}, resample {processor.resample!r}"
        expected = f"the shorter side resized to {side} (bicubic), the central square, and normalised colours"
        raise UserError(f"{what} prepares pictures otherwise ({asked}, ...); expected {expected}")
    return processor.image_mean, processor.image_std
