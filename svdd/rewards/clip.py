"""Agreement of image and prompt: the cosine between their CLIP embeddings.

Sources: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020;
Hessel et al., CLIPScore, 2021, arXiv 2104.08718 (without its factor 2.5 and its cut at 0).
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdd.errors import UserError
from svdd.rewards.base import Reward

__all__ = ["CLIPScore"]

_EMBEDDED = {"emoji": "emoji-clip", "emoji-judge": "emoji-judge"}
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CACHED_PROMPTS = 4096


class CLIPScore(Reward):
    """Cosine similarity of image and prompt under a CLIP model, -1 .. 1.

    Args:
        pretrained: `emoji` (the small CLIP that ships with svdd), `emoji-judge` (a second one, trained apart, for
            held-out evaluation), a folder, or a hub name such as `openai/clip-vit-large-patch14`.
        revision: Branch, tag or commit of a hub model.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If the model cannot be loaded or is no CLIP.
    """

    differentiable = True
    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: str = "emoji", revision: str | None = None, local_files_only: bool = False) -> None:
        super().__init__()
        self._label = pretrained.removeprefix("emoji").lstrip("-") if pretrained in _EMBEDDED else Path(pretrained).name
        options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        source = pretrained
        if pretrained in _EMBEDDED:
            source, options["local_files_only"] = str(files("svdd") / "assets" / _EMBEDDED[pretrained]), True
        self.clip, self.tokenizer, statistics = _load(source, options)
        self.clip.requires_grad_(False).eval()
        self.side = int(self.clip.config.vision_config.image_size)
        for key, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)
        self._text_cache: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """`CLIPScore`, with the model's name where it is not the embedded one."""
        return f"CLIPScore-{self._label}" if self._label else "CLIPScore"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image with its own prompt, float [n]."""
        features = self.image_features(images)
        return (features * self._text_features(prompts).to(features)).sum(-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Returns the embedding of each image, of length 1, float32 [n, d].

        Args:
            images: float [n, 3, h, w] in [0, 1].
        """
        features = self.clip.get_image_features(pixel_values=self.preprocess(images).to(self.clip.dtype))
        return F.normalize(_pooled(features).float(), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resizes the shorter side (antialiased bicubic), cuts the centre square and normalises, as CLIP's processor.

        Args:
            images: float [n, 3, h, w] in [0, 1].
        """
        height, width = images.shape[-2:]
        short = min(height, width)
        if short != self.side:
            size = (self.side * height // short, self.side * width // short)
            images = F.interpolate(
                images.float(), size=size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        top, left = ((extent - self.side) // 2 for extent in images.shape[-2:])
        images = images[..., top : top + self.side, left : left + self.side]
        return (images - self.mean.to(images)) / self.std.to(images)

    @torch.inference_mode(False)  # what is kept must serve gradients later
    @torch.no_grad()
    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        if new:
            if len(self._text_cache) + len(new) > _CACHED_PROMPTS:
                self._text_cache.clear()
                new = list(dict.fromkeys(prompts))
            limit = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(new, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            tokens = tokens.to(self.clip.device)
            features = self.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            features = F.normalize(_pooled(features).float(), dim=-1)
            self._text_cache.update(zip(new, features, strict=True))
        return torch.stack([self._text_cache[prompt].to(self.clip.device) for prompt in prompts])


def _pooled(features: Any) -> Tensor:
    """Transformers 5 wraps the projected embedding in an object, earlier versions return it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _load(source: str, options: dict[str, Any]) -> tuple[Any, Any, tuple[Sequence[float], Sequence[float]]]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    path = Path(source).expanduser()
    if path.exists() or looks_local:
        source = str(path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"CLIPScore: pretrained={source!r} has no config.json; expected `emoji`, `emoji-judge`, a folder saved "
                "by CLIPModel.save_pretrained, or a hub name such as openai/clip-vit-large-patch14"
            )
    try:
        config = CLIPConfig.from_pretrained(source, **options)
        if config.model_type != "clip":
            raise UserError(f"CLIPScore: pretrained={source!r} is a {config.model_type} model; expected a CLIP")
        model = CLIPModel.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = CLIPTokenizer.from_pretrained(source, **options)
    except (OSError, KeyError) as error:
        raise UserError(f"CLIPScore: pretrained={source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    statistics: tuple[Sequence[float], Sequence[float]]
    try:
        processor = CLIPImageProcessor.from_pretrained(source, **options)
        statistics = (processor.image_mean, processor.image_std)
    except OSError:  # a folder without a preprocessor_config.json: OpenAI's numbers, which all CLIPs started from
        statistics = (_OPENAI_MEAN, _OPENAI_STD)
    return model, tokenizer, statistics
