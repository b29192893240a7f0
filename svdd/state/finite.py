"""Refuses NaN and infinity where they arise, before a reward or a selection sees them."""

from collections.abc import Callable

import torch
from torch import Tensor

from svdd import NotFinite

__all__ = ["require_finite"]


def require_finite(
    part: str, source: Tensor, *found: Tensor, where: str = "", prompt: Callable[[int], str] | None = None
) -> None:
    """Raises NotFinite if a row of `found`, [n, ...] each, has NaN or infinity; synchronises a CUDA device.

    Args:
        part: What computed `found`; the sampler is named instead if rows of `source` are not finite either.
        source: What `found` was computed from, [n, ...].
        found: Tensors with one row per row of `source`.
        where: The step, for the message.
        prompt: Returns the prompt of a row.
    """
    if not len(bad := _rows(*found)):
        return
    if len(_rows(source)):
        part = "sampler"
    first = "" if prompt is None else f", first for the prompt {prompt(int(bad[0]))!r}"
    kind = source.device.type
    if torch.float16 in (source.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None):
        help = (
            "float16 overflows above 65504: set --trainer.precision to bf16-true or 32-true (in Python: model.float())"
        )
    else:
        help = "check the model's weights, its guidance_scale, and the scale of a sampler with gradients"
    raise NotFinite(f"the {part} returned NaN or infinity for {len(bad)} of {len(source)} rows{where}{first}; {help}")


def _rows(*tensors: Tensor) -> Tensor:
    """Returns the indices of the rows, over all tensors, whose sum is not finite."""
    sums = [tensor.detach().flatten(1).sum(1, dtype=torch.float32) for tensor in tensors]
    return (~sum(sums[1:], start=sums[0]).isfinite()).nonzero()
