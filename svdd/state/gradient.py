"""The gradient of a value with respect to the latents of a state, row by row."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Denoised

if TYPE_CHECKING:
    from svdd.state.state import State

__all__ = ["Slope", "differentiate"]


class Slope(NamedTuple):
    """Values of rows, float [n], their gradients, [n, c, h, w], and the prediction of the same network evaluation."""

    values: Tensor
    gradient: Tensor
    x0: Tensor
    mean: Tensor


def differentiate(state: "State", value: Callable[["State"], Tensor], through_denoiser: bool) -> Slope:
    """Differentiates chunk by chunk, so that `chunk_size` bounds the memory of the graph; see `State.gradient`.

    Raises:
        UserError: If the value does not depend on what it is differentiated by.
    """
    ledger = state.context.ledger
    known = () if through_denoiser else tuple(state.prediction)

    def chunk(x: Tensor, row: Tensor, origin: Tensor, *known: Tensor) -> Slope:
        with torch.enable_grad():
            part = replace(state, x=x.detach().requires_grad_(through_denoiser), row=row, origin=origin, _cache={})
            if known:
                part._cache["prediction"] = Denoised(known[0].detach().requires_grad_(), known[1])
            before = ledger.denoiser_rows
            values = value(part)
            between = ledger.denoiser_rows - before  # network evaluations between the latents and the values
            if not values.requires_grad:
                raise UserError(
                    f"the value has no gradient at {'x' if through_denoiser else 'x0'}: it does not depend on it"
                )
            (slope,) = torch.autograd.grad(values.sum(), part.x if through_denoiser else part.x0)
        ledger.gradient_rows += between
        return Slope(values.detach(), slope, *(tensor.detach() for tensor in part.prediction))

    return state.context.diffusion.chunker.map(chunk, len(state.x), state.x, state.row, state.origin, *known)
