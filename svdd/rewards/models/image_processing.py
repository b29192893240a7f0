"""Image processors of transformers, applied to tensors so that gradients flow through them."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from svdd import UserError, first_line

__all__ = ["Preprocessing"]

_TOLERANCE = 3 / 255  # for 8-bit images, processors round after each of two passes


class Preprocessing:
    """Turns images into the pixels that a model reads, as its processor (transformers or timm) does, without rounding.

    Raises:
        UserError: If the processor cannot process float tensors, or treats them differently from 8-bit images.
    """

    def __init__(self, processor: Any, source: str) -> None:
        timm = hasattr(processor, "val_transforms")  # transformers' wrapper
        rescales = getattr(processor, "do_rescale", timm)
        self.scale = 255 * getattr(processor, "rescale_factor", 1 / 255) if rescales else 255.0
        self.options = {} if timm else {"do_rescale": False}
        self.original, self.processor = processor, deepcopy(processor)
        refused = f"pretrained={source!r} prepares images with a {type(processor).__name__}"
        try:
            if timm:
                self.processor.val_transforms.transforms.insert(1, lambda images: images.clamp(0, 1))  # after resizing
            else:
                self.processor.resize = self._resize
            difference = max(self._difference(height, width) for height, width in ((96, 61), (250, 371)))
        except Exception as error:  # an unknown processor may raise anything
            raise UserError(f"{refused} that svdd cannot follow: {first_line(error)}") from error
        if difference > _TOLERANCE:
            raise UserError(f"{refused} that treats tensors differently: pixels differ by {difference:.2g} of white")

    def __call__(self, images: Tensor) -> Tensor:
        """Returns what the model reads, float [n, 3, ...], from images, float [n, 3, h, w] in [0, 1]."""
        return self.processor(images=images.float() * self.scale, return_tensors="pt", **self.options).pixel_values

    def _resize(self, image: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Clamps what overshoots at edges; 8-bit images are clamped by their type."""
        resized = self.original.resize(image, *arguments, **options)
        return resized if resized.shape == image.shape else resized.clamp(0, self.scale)

    def _difference(self, height: int, width: int) -> float:
        """Returns the largest difference to the processor's pixels for a smooth 8-bit image, as a fraction of white."""
        waves = [torch.linspace(0, 3 * torch.pi, extent) for extent in (height, width)]
        rows, columns = waves[0].sin()[:, None], waves[1].sin()[None]
        image = ((torch.stack([rows + 0 * columns, columns + 0 * rows, rows * columns]) * 0.2 + 0.5) * 255).round()
        theirs = self.original(images=image.permute(1, 2, 0).to(torch.uint8).numpy(), return_tensors="pt").pixel_values
        ours = self((image[None] / 255).requires_grad_())
        if theirs.shape != ours.shape or not ours.requires_grad:
            shapes = f"{list(ours.shape[1:])}; expected {list(theirs.shape[1:])}"
            raise ValueError(f"it turns tensors into shape {shapes}, with a gradient")
        white = self(torch.ones(1, 3, height, width)) - self(torch.zeros(1, 3, height, width))
        return float((theirs - ours.detach()).abs().max() / white.max())
