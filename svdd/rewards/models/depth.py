"""Depth of a picture's pixels, by a model of transformers.

Source: Ranftl et al., Vision Transformers for Dense Prediction, 2021, arXiv 2103.13413 (DPT).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd.assets.hub import read_auto, read_model

__all__ = ["DepthModel"]


class DepthModel(nn.Module):
    """A monocular depth estimator of transformers: a folder or a hub name."""

    def __init__(self, pretrained: str, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.model = read_model(AutoModelForDepthEstimation, pretrained, torch.float32, **options)
        self.processor = read_auto(AutoImageProcessor, pretrained, **options)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns what the model predicts for images, float [n, 3, h, w] in [0, 1], resized to them: float [n, h, w].

        Most models predict the inverse depth, which is high for what is near.
        """
        pixels = self.processor(images=list(images), do_rescale=False, return_tensors="pt").pixel_values
        depth = self.model(pixel_values=pixels.to(images.device)).predicted_depth
        return F.interpolate(depth[:, None], images.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
