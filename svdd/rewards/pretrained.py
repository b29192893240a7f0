"""Rewards with a pretrained network, loaded at first use, and what reads such networks."""

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import loading, locate
from svdd.rewards.base import Reward

__all__ = ["PretrainedReward", "linear_head", "read_auto", "read_model"]


@dataclass(eq=False, repr=False, kw_only=True)
class PretrainedReward(Reward):
    """A reward whose network is loaded at first use; a subclass, a dataclass, implements `read` and uses `network`.

    Args:
        revision: Branch, tag or commit of a hub model.
        local_files_only: Use local files and the hub's cache only.
    """

    revision: str | None = None
    local_files_only: bool = False
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows the module's device and precision
        self.pretrained_network: Any = None

    @abstractmethod
    def read(self) -> nn.Module:
        """Returns the network with its weights, on the CPU; raises UserError if it cannot."""

    @property
    def network(self) -> Any:
        """The network: frozen, in evaluation mode, on the module's device and in its precision."""
        if self.pretrained_network is None:
            try:
                with torch.inference_mode(False):  # inference tensors could never carry a gradient
                    self.pretrained_network = self.read().requires_grad_(False).eval().to(self.anchor)
            except UserError as error:
                raise UserError(f"{type(self).__name__}: {error}") from error
        return self.pretrained_network

    def load(self) -> None:
        """Loads the weights now."""
        _ = self.network


def read_auto(auto: Any, pretrained: str, **options: Any) -> Any:
    """Returns `auto.from_pretrained` of a folder or a hub name, or raises UserError; code in it is never run."""
    source = locate("pretrained", pretrained, "config.json", "a folder saved by save_pretrained or a hub name")
    with loading(f"pretrained={pretrained!r}"):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


def read_model(auto: Any, pretrained: str, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a model, its weights in `dtype`; raises UserError if it is of another kind or weights are missing."""
    model, info = read_auto(auto, pretrained, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        problem = f"lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}"
        raise UserError(f"pretrained={pretrained!r} {problem}; expected a model trained for this task")
    return model


def linear_head(width: int) -> nn.Sequential:
    """Returns linear layers d-1024-128-64-16-1 without activations, for features [n, d]."""
    layers = [nn.Linear(*widths) for widths in pairwise((width, 1024, 128, 64, 16, 1))]
    return nn.Sequential(OrderedDict(zip("02467", layers, strict=True)))  # 1, 3 and 5 were dropouts
