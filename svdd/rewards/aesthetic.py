"""The LAION aesthetic score: human ratings of beauty, 1 to 10, predicted from a CLIP embedding.

Source: Schuhmann et al., LAION-5B, 2022, arXiv 2210.08402, and their improved-aesthetic-predictor (linear layers on the
normalised embedding of CLIP ViT-L/14, trained on SAC, Logos and AVA), Apache-2.0.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd.assets.hub import find_file, fit_weights, read_weights
from svdd.rewards.models.auto_models import read_model
from svdd.rewards.models.clip_models import find_clip, processor_statistics
from svdd.rewards.models.pixels import fit_square, normalise
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["Aesthetic", "AestheticHead"]


class Aesthetic(PretrainedReward):
    """LAION aesthetic score v2 of the image alone, about 1 (poor) to 10 (beautiful).

    Args:
        pretrained: The CLIP that embeds the image: a folder or a hub name.
        head: Weights of the linear layers: a file, or owner/name/file on the hub.
        revision: Branch, tag or commit of the CLIP on the hub.
        local_files_only: Use local files and the hub's cache only.

    Raises:
        UserError: If the model or the head cannot be loaded, or their widths differ.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(revision, local_files_only)
        self.pretrained, self.head = pretrained, head

    def read(self) -> nn.Module:
        """Returns the image encoder and the head."""
        head = find_file(self.head, local_files_only=self.options["local_files_only"])
        return _Judge(self.pretrained, self.options, read_weights(head), str(head))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the score of each image, float [n]."""
        return self.network(images)


class AestheticHead(nn.Module):
    """Linear layers d-1024-128-64-16-1 without activations.

    The layers stay in float32 in a half-precision module, whose rounding would exceed the differences between images.

    Args:
        width: d, the length of the embedding.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        layers = [nn.Linear(*widths) for widths in pairwise((width, 1024, 128, 64, 16, 1))]
        self.layers = nn.ModuleDict(dict(zip("02467", layers, strict=True)))  # 1, 3 and 5 are dropouts

    def forward(self, features: Tensor) -> Tensor:
        """Returns the score of each embedding, [n], from embeddings [n, d] of any length."""
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.to(next(self.parameters()).dtype), dim=-1)
            for layer in self.layers.values():
                features = layer(features)
            return features[:, 0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AestheticHead":
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(at_least_float32, recurse)


class _Judge(nn.Module):
    """The image encoder, and the head on its normalised embedding."""

    def __init__(self, pretrained: str, options: dict[str, Any], head: dict[str, Tensor], head_name: str) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        source, options = find_clip(pretrained, options)
        self.clip: Any = read_model(CLIPVisionModelWithProjection, source, torch.float32, **options)
        self.head = AestheticHead(self.clip.config.projection_dim)
        fit_weights(self.head, head, head_name)
        self.mean, self.std = processor_statistics(source, options)

    def forward(self, images: Tensor) -> Tensor:
        pixels = normalise(fit_square(images, self.clip.config.image_size, rounded=True), self.mean, self.std)
        return self.head(self.clip(pixel_values=pixels.to(self.clip.dtype)).image_embeds)
