"""The work of an image processor of transformers, done on tensors so that gradients flow through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdd import UserError
from svdd.rewards.models.pixels import normalise

__all__ = ["Preprocessing", "read_preprocessing"]

_MODES = {None: "bilinear", 2: "bilinear", 3: "bicubic"}  # by PIL's number
_TOLERANCE = 3 / 255  # the processors round to 8 bits after each of two passes


@dataclass(frozen=True)
class Preprocessing:
    """Resizes, cuts the centre, scales and normalises.

    Args:
        shorter: What the shorter side becomes, or None.
        whole: What height and width become whatever the shape, or None.
        crop: Height and width of the centre that is kept, or None.
        mode: `bilinear` or `bicubic`, antialiased.
        scale: What white is before the normalisation.
        mean: Of each colour.
        std: Of each colour.
    """

    shorter: int | None
    whole: tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str
    scale: float
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor) -> Tensor:
        """Returns what the model reads, float [n, 3, ...], from float [n, 3, h, w] in [0, 1]."""
        height, width = images.shape[-2:]
        size = self.whole or (height, width)
        if self.shorter is not None:
            size = (self.shorter * height // min(height, width), self.shorter * width // min(height, width))
        if size != (height, width):
            images = F.interpolate(images.float(), size=size, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = ((extent - kept) // 2 for extent, kept in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return normalise(images.float() * self.scale, self.mean, self.std)


def read_preprocessing(processor: Any, source: str) -> Preprocessing:
    """Returns the same work on tensors, after comparing both on two pictures.

    Args:
        processor: An image processor of transformers.
        source: Where it comes from, for messages.

    Raises:
        UserError: If it does anything else.
    """
    refused = f"pretrained={source!r} prepares images with a {type(processor).__name__}"
    try:
        made = _of_timm(processor) if hasattr(processor, "data_config") else _of_transformers(processor)
        differences = [_difference(made, processor, height, width) for height, width in ((96, 61), (250, 371))]
    except Exception as error:  # whatever a processor that we do not know raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{refused} that svdd cannot follow: {reason}") from error
    if max(differences) > _TOLERANCE:
        raise UserError(
            f"{refused} that does more than resize, cut and normalise: its pixels differ by {max(differences):.2g} of 1"
        )
    return made


def _of_transformers(processor: Any) -> Preprocessing:
    """Returns what the attributes of a processor say.

    Raises:
        ValueError: If they ask for more than `Preprocessing` does.
    """
    sizes = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    size, cut = ({key: value for key, value in sides.items() if value} for sides in sizes)
    crop = (cut["height"], cut["width"]) if getattr(processor, "do_center_crop", False) else None
    resample: Any = getattr(processor, "resample", None)
    shorter: int | None = None
    whole: tuple[int, int] | None = None
    if getattr(processor, "do_resize", False):
        if resample not in _MODES:
            raise ValueError(f"it resamples in PIL's mode {int(resample)}; expected 2 (bilinear) or 3 (bicubic)")
        if set(size) == {"height", "width"}:
            whole = (size["height"], size["width"])
        elif set(size) != {"shortest_edge"}:
            raise ValueError(f"its size is {size}; expected shortest_edge, or height and width")
        elif "ConvNext" not in type(processor).__name__:
            shorter = size["shortest_edge"]
        elif (edge := size["shortest_edge"]) < 384:  # ConvNeXt's rule, which ResNet and others took over
            shorter, crop = int(edge / processor.crop_pct), (edge, edge)
        else:
            whole = (edge, edge)
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255.0
    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(shorter, whole, crop, _MODES.get(resample, "bilinear"), scale, mean, std)


def _of_timm(processor: Any) -> Preprocessing:
    """Returns what the configuration of a model of timm says."""
    wanted = processor.data_config
    crop = tuple(wanted["input_size"][1:])
    shorter = int(crop[0] / wanted["crop_pct"])
    return Preprocessing(shorter, None, crop, wanted["interpolation"], 1.0, wanted["mean"], wanted["std"])


def _difference(made: Preprocessing, processor: Any, height: int, width: int) -> float:
    """Returns the largest difference between our pixels and the processor's, in units of white, on a smooth picture."""
    waves = [torch.linspace(0, 3 * torch.pi, extent) for extent in (height, width)]
    rows, columns = waves[0].sin()[:, None], waves[1].sin()[None]
    picture = ((torch.stack([rows + 0 * columns, columns + 0 * rows, rows * columns]) * 0.2 + 0.5) * 255).round()
    theirs = processor(images=picture.permute(1, 2, 0).to(torch.uint8).numpy(), return_tensors="pt").pixel_values
    ours = made(picture[None] / 255)
    if theirs.shape != ours.shape:
        raise ValueError(f"it makes pixels of shape {list(theirs.shape[1:])}, expected {list(ours.shape[1:])}")
    return float(((theirs - ours) * ours.new_tensor(list(made.std))[:, None, None]).abs().max() / made.scale)
