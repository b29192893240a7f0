"""Rewards with a pretrained network, loaded at first use, and a head that two of them share."""

import inspect
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from svdd import RewardError, UserError
from svdd.assets.loaded import borrow
from svdd.rewards.base import Reward, full_precision

__all__ = ["Precision", "PretrainedReward", "linear_head"]

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(eq=False, repr=False, kw_only=True)
class PretrainedReward(Reward):
    """A reward whose network is loaded at first use; a subclass, a dataclass, implements `read` and uses `network`.

    Args:
        revision: Branch, tag or commit of a hub model.
        local_files_only: Use local files and the hub's cache only.
        dtype: Precision of the network, whatever that of the Trainer: half precision saves memory, and time on a GPU.
    """

    revision: str | None = None
    local_files_only: bool = False
    dtype: Precision = "float32"
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        if not isinstance(name := getattr(self, "pretrained", ""), str):
            raise UserError(f"pretrained must be a folder or the name of a model, got {name!r}")
        if self.dtype not in get_args(Precision):
            raise UserError(f"dtype must be {', '.join(get_args(Precision)[:-1])} or float16, got {self.dtype!r}")
        self.options: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        precision = getattr(torch, self.dtype)
        self.register_buffer("anchor", torch.zeros((), dtype=precision), persistent=False)  # follows `to`
        self.pretrained_network: Any = None

    @abstractmethod
    def read(self) -> nn.Module:
        """Returns the network on the CPU, loaded with `options`, in any floating type.

        Raises:
            UserError: If it cannot be loaded.
        """

    def loading_key(self) -> Hashable:
        """Returns all that `read` depends on; None if that is unknown: then several runs do not share the network."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        values = [getattr(self, name, ...) for name in names]
        plain = all(value is None or isinstance(value, str | int | float) for value in values)
        return (type(self), *values) if plain else None

    def _read(self) -> tuple[Any, dict[str, Any]]:
        """Returns the network, and the attributes that `read` has set."""
        before = vars(self) | self._modules
        network = self.read()
        after = vars(self) | self._modules
        return network, {name: value for name, value in after.items() if before.get(name, ...) is not value}

    @property
    def network(self) -> Any:
        """The network: frozen, in evaluation mode, on the module's device and in the precision `dtype`."""
        if self.pretrained_network is None:
            try:
                with torch.inference_mode(False), full_precision():  # inference tensors could never carry a gradient
                    network, found = borrow("reward", self.loading_key(), self._read)
                    for name, value in found.items():
                        setattr(self, name, value)
                    if hasattr(network, "forget"):
                        network.forget()
                    self.pretrained_network = network.requires_grad_(False).eval().to(self.anchor)
            except UserError as error:
                raise UserError(f"{type(self).__name__}: {error}") from error
            except AttributeError as error:  # torch would report this property, not the attribute
                raise RewardError(f"{type(self).__name__}.read failed with AttributeError: {error}") from error
        return self.pretrained_network

    def load(self) -> None:
        """Loads the weights now."""
        _ = self.network


def linear_head(width: int) -> nn.Sequential:
    """Returns linear layers d-1024-128-64-16-1 without activations, for features [n, d]."""
    layers = [nn.Linear(*widths) for widths in pairwise((width, 1024, 128, 64, 16, 1))]
    return nn.Sequential(OrderedDict(zip("02467", layers, strict=True)))  # 1, 3 and 5 were dropouts
