"""CLIP models behind one interface, from transformers and from open_clip."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import LOAD_ERRORS, fit_weights, is_local, offline, read_weights
from svdd.rewards.models.auto_models import read_model
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, fit_square, normalise

__all__ = ["EMBEDDED", "ClipModel", "OpenClipModel", "TransformersClip"]

EMBEDDED = {"emoji": "emoji-clip", "emoji-judge": "emoji-judge"}
_CACHED_PROMPTS = 4096


class ClipModel(nn.Module, ABC):
    """A pair of encoders that place images and texts on one sphere."""

    side: int
    mean: Sequence[float]
    std: Sequence[float]
    whole = False
    mode = "bicubic"
    rounded = False

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[str, Tensor] = {}

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, [n, d]."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The length of an embedding."""

    def preprocess(self, images: Tensor) -> Tensor:
        """Resizes, cuts and normalises as the model's own processor."""
        return normalise(fit_square(images, self.side, self.whole, self.mode, self.rounded), self.mean, self.std)

    def image_features(self, images: Tensor) -> Tensor:
        """Returns the embedding of each image, of length 1, float32 [n, d].

        Args:
            images: float [n, 3, h, w] in [0, 1].
        """
        pixels = self.preprocess(images).to(next(self.parameters()).dtype)
        return F.normalize(self.encode_images(pixels).float(), dim=-1)

    @torch.inference_mode(False)  # what is kept must serve gradients later
    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns the embedding of each text, of length 1, float32 [n, d]; the latest thousands are remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _CACHED_PROMPTS:
            self._texts.clear()
            new = list(dict.fromkeys(texts))
        if new:
            features = F.normalize(self.encode_texts(new).float(), dim=-1)
            self._texts.update(zip(new, features, strict=True))
        device = next(self.parameters()).device
        return torch.stack([self._texts[text].to(device) for text in texts])


class TransformersClip(ClipModel):
    """A CLIP in the format of transformers.

    Args:
        pretrained: `emoji`, `emoji-judge`, a folder or a hub name.
        options: `revision` and `local_files_only`.
        processor: Where tokenizer and image processor come from, if not from there.

    Raises:
        UserError: If it cannot be loaded, is no CLIP, or lacks weights.
    """

    def __init__(self, pretrained: str, options: dict[str, Any], processor: str | None = None) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer

        source, options = locate(pretrained, options)
        words = source if processor is None else processor
        others = options if processor is None else {**options, "revision": None}
        self.clip: Any = read_model(CLIPModel, source, torch.float32, **options)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(words, **others)
        except LOAD_ERRORS as error:
            raise UserError(f"the tokenizer of {words!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.side = int(self.clip.config.vision_config.image_size)
        self.scale: float = self.clip.logit_scale.exp().item()  # whatever becomes of the weights' precision
        self.mean, self.std = processor_statistics(words, others)

    @property
    def width(self) -> int:
        """The projection's."""
        return int(self.clip.config.projection_dim)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""
        return pooled(self.clip.get_image_features(pixel_values=pixels))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, cut to what the model can read, [n, d]."""
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.clip.device)
        return pooled(self.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask))


class OpenClipModel(ClipModel):
    """A CLIP of open_clip.

    Args:
        architecture: A name that open_clip knows, such as `ViT-H-14`, `hf-hub:owner/name` or `local-dir:/folder`.
        pretrained: One of open_clip's tags for it, a file of weights, or nothing where the architecture brings them.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If open_clip is not installed, does not know the names, the weights do not fit, or the model prepares
            pictures in a way that svdd does not follow.
    """

    rounded = True

    def __init__(self, architecture: str, pretrained: str | None, local_files_only: bool = False) -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise UserError("models of open_clip need the package: pip install 'svdd[open-clip]'") from error
        brings_weights = architecture.startswith(("hf-hub:", "local-dir:"))
        own_file = Path(pretrained).expanduser() if pretrained and not brings_weights else None
        own_file = own_file if own_file is not None and own_file.is_file() else None
        if not brings_weights and architecture not in open_clip.list_models():
            raise UserError(f"open_clip knows no architecture {architecture!r}; `open_clip.list_models()` lists them")
        if not brings_weights and own_file is None:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            if pretrained not in tags:
                raise UserError(
                    f"open_clip has no weights {pretrained!r} for {architecture}; known: {', '.join(tags) or 'none'}; "
                    "or give a file of weights"
                )
        tag = None if brings_weights or own_file is not None else pretrained
        if local_files_only and tag and not open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub"):
            raise UserError(
                f"open_clip fetches {tag!r} for {architecture} from no hub, so local_files_only cannot be kept; give a "
                "file of weights"
            )
        try:
            with offline() if local_files_only else nullcontext():
                self.clip = open_clip.create_model(architecture, tag, load_weights=own_file is None, precision="fp32")
                self.tokenizer = open_clip.get_tokenizer(architecture)
        except LOAD_ERRORS as error:
            raise UserError(f"open_clip cannot load {architecture!r}: {str(error).splitlines()[0]}") from error
        if own_file is not None:
            fit_weights(self.clip, read_weights(own_file), str(own_file), ignore=("position_ids",))
        wants = {"size": 224, "mean": CLIP_MEAN, "std": CLIP_STD} | open_clip.get_model_preprocess_cfg(self.clip)
        sides = {wants["size"]} if isinstance(wants["size"], int) else set(wants["size"])
        if wants.get("resize_mode", "shortest") not in ("shortest", "squash") or len(sides) > 1:
            raise UserError(
                f"{architecture!r} of open_clip prepares pictures of size {wants['size']} with resize_mode "
                f"{wants.get('resize_mode')!r}, which svdd does not follow; expected a square, and shortest or squash"
            )
        self.side, self.whole = int(sides.pop()), wants.get("resize_mode") == "squash"
        self.mean, self.std = wants["mean"], wants["std"]
        self.mode = "bilinear" if wants.get("interpolation") == "bilinear" else "bicubic"

    @property
    def width(self) -> int:
        """The length of the text projection."""
        with torch.no_grad():
            return int(self.encode_texts([""]).shape[-1])

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Returns the projected embedding of preprocessed pixels, [n, d]."""
        return self.clip.encode_image(pixels)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the projected embedding of each text, [n, d]."""
        return self.clip.encode_text(self.tokenizer(texts).to(next(self.clip.parameters()).device))


def pooled(features: Any) -> Tensor:
    """Transformers 5 wraps the projected embedding in an object, earlier versions return it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def locate(pretrained: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns where a CLIP in the format of transformers is, and the options to load it with.

    Raises:
        UserError: If it is no CLIP, or not there.
    """
    from transformers import AutoConfig

    if pretrained in EMBEDDED:
        return str(files("svdd") / "assets" / EMBEDDED[pretrained]), {**options, "local_files_only": True}
    source = str(Path(pretrained).expanduser()) if is_local(pretrained) else pretrained
    if is_local(pretrained) and not (Path(source) / "config.json").is_file():
        raise UserError(
            f"pretrained={source!r} has no config.json; expected `emoji`, `emoji-judge`, a folder saved by "
            "CLIPModel.save_pretrained, or a hub name such as openai/clip-vit-large-patch14"
        )
    try:
        kind = AutoConfig.from_pretrained(source, **options).model_type
    except LOAD_ERRORS as error:
        raise UserError(f"pretrained={source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if kind != "clip":
        raise UserError(f"pretrained={source!r} is a {kind} model; expected a CLIP")
    return source, options


def processor_statistics(source: str, options: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Returns mean and standard deviation of the colours; OpenAI's for a folder without preprocessor_config.json."""
    from transformers import CLIPImageProcessor

    try:
        processor = CLIPImageProcessor.from_pretrained(source, **options)
    except OSError:
        return CLIP_MEAN, CLIP_STD
    return processor.image_mean, processor.image_std
