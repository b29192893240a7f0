"""Rewards with weights of their own: read when they are first needed, and only as data."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.rewards.base import Reward

__all__ = ["PretrainedReward"]


class PretrainedReward(Reward):
    """A reward whose network is read at the first use, onto the device and into the precision of the module.

    A subclass implements `read`, and uses `network`.
    """

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # moves with the module
        self.pretrained_network: Any = None

    @abstractmethod
    def read(self) -> nn.Module:
        """Returns the network with its weights, on the CPU.

        Raises:
            UserError: If it cannot be loaded, or is another kind of model.
        """

    @property
    def network(self) -> Any:
        """The network: frozen, in evaluation mode, where the module is."""
        if self.pretrained_network is None:
            with torch.inference_mode(False):  # weights made in inference mode could never carry a gradient
                try:
                    network = self.read()
                except UserError as error:
                    raise UserError(f"{type(self).__name__}: {error}") from error
                self.pretrained_network = network.requires_grad_(False).eval().to(self.anchor)
        return self.pretrained_network

    def load(self) -> None:
        """Reads the weights now."""
        _ = self.network
