"""Similarity to a reference picture: by DINOv2, by CLIP, or by LPIPS.

Sources: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023, arXiv 2304.07193; Radford et
al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020; Zhang et al., The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, arXiv 1801.03924 (LPIPS 0.1).
"""

import hashlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import RewardError, UserError
from svdd.assets.hub import read_auto, read_model
from svdd.assets.pictures import decode, read_content
from svdd.rewards.classifier import Preprocessing
from svdd.rewards.columns import column_path
from svdd.rewards.models.clip_models import TransformersClip
from svdd.rewards.models.lpips import DEFAULT, read_lpips
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["Similarity"]

Features = Literal["dinov2", "clip", "lpips"]
_DEFAULTS = {"dinov2": "facebook/dinov2-base", "clip": "emoji", "lpips": DEFAULT}
_LEAST_SIDE = 64  # of an image for `lpips`: the backbone halves it several times
_MOST_EMBEDDINGS, _MOST_PICTURES = 4096, 64  # of references that are kept


@dataclass(eq=False, repr=False)
class Similarity(PretrainedReward):
    """Similarity to a reference picture: the cosine of their embeddings, or minus their LPIPS distance.

    Args:
        features: What is compared: `dinov2` (or another vision model of transformers), `clip`, or `lpips`.
        pretrained: Its weights. `dinov2`: a folder or a hub name, by default `facebook/dinov2-base`; `clip`: these too,
            or `emoji` (the default) or `emoji-judge`, which ship with svdd; `lpips`: torchvision's `alex` (the default)
            or `vgg`, which it downloads, or a file with one of them.
        reference: A picture with which all are compared. By default each prompt has its own.
        reference_column: Column of the prompt file with the path of the prompt's reference.
        label: Ends the reward's name, as several in one run need.
    """

    features: Features = "dinov2"
    pretrained: str | None = None
    reference: str | None = None
    reference_column: str = "reference"
    label: str = field(default="", kw_only=True)
    differentiable = True
    from_files = ("content",)

    def __post_init__(self) -> None:
        if self.features not in _DEFAULTS:
            raise UserError(f"features must be one of {', '.join(get_args(Features))}, got {self.features!r}")
        own = self.pretrained is not None and self.pretrained != _DEFAULTS[self.features]
        self.pretrained = self.pretrained or _DEFAULTS[self.features]
        super().__post_init__()
        weights = "judge" if self.pretrained == "emoji-judge" else Path(self.pretrained).stem
        self.variant = "-".join(filter(None, (self.features, weights if own else "", self.label)))
        self.range = (-float("inf"), 0.0) if self.features == "lpips" else (-1.0, 1.0)
        self.columns = self.path_columns = () if self.reference else (self.reference_column,)
        self.content = ""  # digest of `reference`
        self._known: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def load(self) -> None:
        """Loads the weights, and checks the reference."""
        super().load()
        if self.reference is not None:
            path = Path(self.reference).expanduser()
            self.content = hashlib.sha256(read_content(path)).hexdigest()
            _picture(path)

    def read(self) -> nn.Module:
        """Returns the network that embeds or compares pictures."""
        assert self.pretrained is not None
        if self.features == "lpips":
            return read_lpips(self.pretrained, self.local_files_only)
        if self.features == "clip":
            return TransformersClip(self.pretrained, self.options)
        return VisionModel(self.pretrained, self.options)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the similarity of each image to its reference, float32 [n]."""
        constant = None if self.reference is None else Path(self.reference).expanduser()
        paths = [constant or column_path(prompt, self.reference_column) or Path() for prompt in prompts]
        if self.features == "lpips" and (short := min(images.shape[-2:])) < _LEAST_SIDE:
            size = [-(-side * _LEAST_SIDE // short) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        references = self._references(paths, images)
        if self.features == "lpips":
            dtype = next(self.network.parameters()).dtype
            return -self.network(images.to(dtype), references.to(dtype), normalize=True).float()[:, 0, 0, 0]
        return (self.network.image_features(images) * references).sum(-1)

    @torch.inference_mode(False)  # references are used in gradients later
    @torch.no_grad()
    def _references(self, paths: list[Path], images: Tensor) -> Tensor:
        """Returns the embedding of each reference, [n, d]; for `lpips` its pixels in the images' size, [n, 3, h, w]."""
        found = {}
        for path in dict.fromkeys(paths):
            key = (*_version(path), *(images.shape[-2:] if self.features == "lpips" else ()))
            known = self._known.pop(key, None)
            if known is None and self.features == "lpips":
                known = _resized(_picture(path), images)
            elif known is None:
                known = self.network.image_features(_picture(path).to(images))
            self._known[key] = found[path] = known.to(images)
        most = _MOST_PICTURES if self.features == "lpips" else _MOST_EMBEDDINGS
        while len(self._known) > most:
            self._known.popitem(last=False)
        return torch.cat([found[path] for path in paths])


class VisionModel(nn.Module):
    """A vision model of transformers, such as DINOv2, with the preprocessing of its own processor."""

    def __init__(self, pretrained: str, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.model = read_model(AutoModel, pretrained, torch.float32, **options)
        if self.model.main_input_name != "pixel_values" or hasattr(self.model.config, "text_config"):
            kind = self.model.config.model_type
            raise UserError(
                f"pretrained={pretrained!r} is a {kind} model; expected one of vision alone, such as DINOv2"
            )
        self.preprocess = Preprocessing(read_auto(AutoImageProcessor, pretrained, **options), pretrained)
        self.processor = self.preprocess.original  # for fingerprints

    def image_features(self, images: Tensor) -> Tensor:
        """Returns the pooled output, or that of the first token, of length 1, float32 [n, d]."""
        output = self.model(pixel_values=self.preprocess(images).to(self.model.dtype))
        pooled = getattr(output, "pooler_output", None)
        features = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return F.normalize(features.float(), dim=-1)


def _version(path: Path) -> tuple[Any, ...]:
    """Returns what differs if a file has changed; only the path if it cannot be read, as reading it will say."""
    with suppress(OSError):
        known = path.stat()
        return path, known.st_size, known.st_mtime_ns
    return (path,)


def _picture(path: Path) -> Tensor:
    """Returns a picture, float32 [1, 3, h, w] in [0, 1]; raises RewardError if it cannot be read."""
    try:
        pixels = torch.from_numpy(decode(read_content(path), str(path)))
    except UserError as error:
        raise RewardError(f"reference {error}") from error
    return pixels.permute(2, 0, 1)[None].float() / 255


def _resized(picture: Tensor, images: Tensor) -> Tensor:
    """Returns a picture in the size of images, on their device."""
    size = images.shape[-2:]
    if picture.shape[-2:] != size:
        picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return picture.to(images)
