"""The LAION aesthetic score: human ratings of beauty, 1 to 10, predicted from a CLIP embedding.

Source: Schuhmann et al., LAION-5B, 2022, arXiv 2210.08402, and their improved-aesthetic-predictor (linear layers on the
normalised embedding of CLIP ViT-L/14, trained on SAC, Logos and AVA), Apache-2.0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd.assets.hub import find_file, fit_weights, read_weights
from svdd.rewards.models.clip_models import colour_statistics, read_clip
from svdd.rewards.models.pixels import fit_square, normalise
from svdd.rewards.pretrained import PretrainedReward, linear_head

__all__ = ["Aesthetic", "AestheticHead"]


@dataclass(eq=False, repr=False)
class Aesthetic(PretrainedReward):
    """LAION aesthetic score v2 of the image alone, about 1 (poor) to 10 (beautiful).

    Args:
        pretrained: The CLIP that embeds the image: a folder or a hub name.
        head: Weights of the linear layers: a file, or owner/name/file on the hub.
    """

    pretrained: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    differentiable = True
    from_files = ("mean", "std")

    def read(self) -> nn.Module:
        """Returns the image encoder `clip`, and the `head` on its normalised embedding."""
        from transformers import CLIPVisionModelWithProjection

        file = find_file(self.head, local_files_only=self.local_files_only)
        spare = r"^(text_model|text_projection|logit_scale)\b|position_ids$"  # of the whole CLIP
        clip, source, options = read_clip(CLIPVisionModelWithProjection, self.pretrained, self.options, spare)
        self.mean, self.std = colour_statistics(source, options, clip.config.image_size)
        head = AestheticHead(clip.config.projection_dim)
        fit_weights(head, read_weights(file), str(file))
        return nn.ModuleDict({"clip": clip, "head": head})

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the score of each image, float [n]."""
        clip, head = self.network.clip, self.network.head
        pixels = normalise(fit_square(images, clip.config.image_size, rounded=True), self.mean, self.std)
        return head(clip(pixel_values=pixels.to(clip.dtype)).image_embeds)


class AestheticHead(nn.Module):
    """The linear layers; float32 in a half-precision module too, where rounding would exceed differences of images."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = linear_head(width)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the score of each embedding, [n], from embeddings [n, width] of any length."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(F.normalize(features.to(next(self.parameters()).dtype), dim=-1))[:, 0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AestheticHead":
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(at_least_float32, recurse)
