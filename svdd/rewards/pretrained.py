"""Rewards with a pretrained network, loaded at first use."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.rewards.base import Reward

__all__ = ["PretrainedReward"]


class PretrainedReward(Reward):
    """A reward whose network is loaded at first use, onto the module's device and into its precision.

    A subclass implements `read` and uses `network` and `options`, the two arguments as `from_pretrained` takes them.

    Args:
        revision: Branch, tag or commit of a hub model.
        local_files_only: Use local files and the hub's cache only.
    """

    anchor: Tensor

    def __init__(self, revision: str | None = None, local_files_only: bool = False) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        if revision is not None:
            self.revision = revision  # a part of the identity
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows the module's device and precision
        self.pretrained_network: Any = None

    @abstractmethod
    def read(self) -> nn.Module:
        """Returns the network with its weights, on the CPU; raises UserError if it cannot."""

    @property
    def network(self) -> Any:
        """The network: frozen, in evaluation mode, on the module's device."""
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
