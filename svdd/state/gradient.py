"""The gradient of a value at the latents of a state."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdd import UserError

if TYPE_CHECKING:
    from svdd.state.state import State

__all__ = ["differentiate"]


def differentiate(value: "Callable[[State], Tensor]", state: "State", leaf: Tensor) -> dict[str, Tensor]:
    """Returns `values`, [n], their `gradient` at a leaf, the state's x or its x0, and its `x0` and `mean`, detached."""
    ledger = state.context.ledger
    before = ledger.denoiser_rows
    with torch.enable_grad():
        values = value(state)
        if not values.requires_grad:
            where = "x" if leaf is state.x else "x0"
            raise UserError(f"the value has no gradient at {where}, on which it does not depend")
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    ledger.gradient_rows += ledger.denoiser_rows - before  # network evaluations between the latents and the values
    x0, mean = (tensor.detach() for tensor in state.prediction)
    return {"values": values.detach(), "gradient": slope, "x0": x0, "mean": mean}
