"""Networks that rewards share: models of transformers, and a head of linear layers."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from svdd import UserError
from svdd.assets.hub import loading, locate

__all__ = ["linear_head", "read_auto", "read_model"]


def read_auto(auto: Any, pretrained: str, **options: Any) -> Any:
    """Returns `auto.from_pretrained` of a folder or a hub name; code in it is never run.

    Raises:
        UserError: If it cannot be loaded.
    """
    source = locate("pretrained", pretrained, "config.json", "a folder saved by save_pretrained or a hub name")
    with loading(f"pretrained={pretrained!r}"):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


def read_model(auto: Any, pretrained: str, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a model by its class or AutoModel class, with weights in `dtype`.

    Raises:
        UserError: If it cannot be loaded, is another kind of model, or weights are missing.
    """
    model, info = read_auto(auto, pretrained, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"pretrained={pretrained!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}; "
            "expected a model trained for this task"
        )
    return model


def linear_head(width: int) -> nn.Sequential:
    """Returns linear layers d-1024-128-64-16-1 without activations, for features [n, d]."""
    layers = [nn.Linear(*widths) for widths in pairwise((width, 1024, 128, 64, 16, 1))]
    return nn.Sequential(OrderedDict(zip("02467", layers, strict=True)))  # 1, 3 and 5 were dropouts
