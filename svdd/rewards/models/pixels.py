"""Pixel operations of image models, on tensors so that gradients flow, and PIL images for the rest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from svdd.rewards.base import to_bytes

__all__ = ["CLIP_MEAN", "CLIP_STD", "fit_square", "luma", "normalise", "smooth_image", "to_pil"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def fit_square(images: Tensor, side: int, whole: bool = False, mode: str = "bicubic", rounded: bool = False) -> Tensor:
    """Resizes the shorter side, antialiased, and crops the centre square, as the processors of CLIP models do.

    Args:
        images: float [n, 3, h, w] in [0, 1]; the result is float [n, 3, side, side] in [0, 1].
        side: Width and height of the result.
        whole: Squeeze the whole image into the square instead of cropping.
        mode: `bicubic` or `bilinear`.
        rounded: Round half of an odd margin to even, as torchvision does, instead of down, as transformers does.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    size = (side, side) if whole else (side * height // short, side * width // short)
    if size != (height, width):
        images = F.interpolate(images.float(), size=size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    margins = (extent - side for extent in images.shape[-2:])
    top, left = (round(margin / 2) if rounded else margin // 2 for margin in margins)
    return images[..., top : top + side, left : left + side]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns (images - mean) / std for each colour."""
    shift, scale = (images.new_tensor(list(values))[:, None, None] for values in (mean, std))
    return (images - shift) / scale


def smooth_image(height: int, width: int) -> Tensor:
    """Returns an image of slow waves with whole 8-bit values, to compare resizing on, float32 [1, 3, h, w]."""
    waves = [torch.linspace(0, 3 * torch.pi, extent).sin() for extent in (height, width)]
    rows, columns = torch.meshgrid(*waves, indexing="ij")
    return ((torch.stack([rows, columns, rows * columns]) * 0.2 + 0.5) * 255).round()[None] / 255


def luma(images: Tensor) -> Tensor:
    """Returns the luma of ITU-R BT.601, float32 [n, h, w] in [0, 1]."""
    images = images.float()
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Returns 8-bit PIL images, from float images, clamped to [0, 1] and rounded, or from uint8 ones."""
    return [Image.fromarray(array) for array in to_bytes(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()]
