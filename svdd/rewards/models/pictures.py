"""Images as pictures, for what does no tensor work."""

import torch
from PIL import Image
from torch import Tensor

__all__ = ["as_pictures"]


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Returns images, cut to [0, 1], as pictures of 8 bits a colour."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]
