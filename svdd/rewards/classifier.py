"""The probability of a label under an image classifier, as in classifier guidance.

Source: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError, did_you_mean, first_line
from svdd.assets.hub import read_auto, read_model
from svdd.rewards.models.pixels import smooth_image
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["Classifier", "Preprocessing", "find_label"]


@dataclass(eq=False, repr=False)
class Classifier(PretrainedReward):
    """Log-probability of a label under an image classifier of transformers; the prompt is not used.

    Args:
        pretrained: A folder, or a hub name such as `google/vit-base-patch16-224`.
        label: The label's name or one of its comma-separated names, in upper or lower case; or its index.
        logit: Return the logit, which is unbounded, instead of the log-probability.
    """

    pretrained: str
    label: int | str
    logit: bool = False
    differentiable = True
    from_files = ("index", "independent", "processor")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.range, self.variant = (-math.inf, math.inf if self.logit else 0.0), str(self.label)

    def read(self) -> nn.Module:
        """Returns the classifier; raises UserError if it has no such label or cannot preprocess tensors."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        network = read_model(AutoModelForImageClassification, self.pretrained, torch.float32, **self.options)
        self.index = find_label(self.label, network.config.id2label)
        self.independent = network.config.problem_type == "multi_label_classification"
        if network.config.num_labels == 1 and not (self.logit or self.independent):
            raise UserError(f"pretrained={self.pretrained!r} has one label, whose probability is always 1; set logit")
        self.preprocess = Preprocessing(read_auto(AutoImageProcessor, self.pretrained, **self.options), self.pretrained)
        self.processor = self.preprocess.original
        return network

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the label's log-probability or logit in each image, float32 [n]."""
        network = self.network
        logits = network(pixel_values=self.preprocess(images).to(next(network.parameters()))).logits.float()
        if not self.logit:
            logits = F.logsigmoid(logits) if self.independent else logits.log_softmax(-1)
        return logits[:, self.index]


def find_label(label: int | str, names: dict[int, str]) -> int:
    """Returns the index of a label; raises UserError if no label or several labels have that name."""
    wanted = str(label).strip().lower()
    parts = {k: [part.strip() for part in name.split(",")] for k, name in names.items()}
    exact = [k for k, name in names.items() if (label == k if isinstance(label, int) else name.lower() == wanted)]
    found = exact or [k for k in names if wanted in map(str.lower, parts[k])]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"label={label!r} is the name of {len(found)} labels; give one of their indices: {found}")
    some = ", ".join(repr(name) for name in list(names.values())[:5])
    hint = did_you_mean(wanted, chain.from_iterable(parts.values()))
    raise UserError(f"label={label!r} is none of the {len(names)} labels, such as {some}{hint}")


class Preprocessing:
    """Turns images into pixels as a processor of transformers or timm does, but for rounding; else raises UserError."""

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
        if difference > 3 / 255:  # processors round 8-bit images after each of two passes
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
        image = smooth_image(height, width)
        picture = (image[0] * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
        theirs = self.original(images=picture, return_tensors="pt").pixel_values
        ours = self(image.requires_grad_())
        if theirs.shape != ours.shape or not ours.requires_grad:
            shapes = f"{list(ours.shape[1:])}; expected {list(theirs.shape[1:])}"
            raise ValueError(f"it turns tensors into shape {shapes}, with a gradient")
        white = self(torch.ones(1, 3, height, width)) - self(torch.zeros(1, 3, height, width))
        return float((theirs - ours.detach()).abs().max() / white.max())
