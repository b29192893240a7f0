"""Models larger than a device: parts stay in the CPU's memory except while they compute."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

__all__ = ["Offload", "OffloadMode"]

OffloadMode = Literal["none", "text_encoders", "model"]


class Offload:
    """Lends a device to one of several modules at a time.

    A module moves there when its `forward`, or an autoencoder's `decode`, is called, and the one before it leaves. The
    CPU keeps its copy of the weights, so nothing is copied back. On a CPU nothing moves.

    Args:
        modules: On the CPU.
        device: Returns the device on which they compute.
    """

    def __init__(self, modules: Sequence[nn.Module], device: Callable[[], torch.device]) -> None:
        self._device = device
        self._there: nn.Module | None = None
        self._kept: list[tuple[Any, Any]] = []  # of its layers: a dictionary of weights, and what it held
        for module in modules:
            add_hook_to_module(module, _Loan(self))

    def bring(self, module: nn.Module) -> None:
        """Moves a module to the device, in the place of the one that is there."""
        if (device := self._device()).type == "cpu" or module is self._there:
            return
        self.release()
        copies: dict[int, Any] = {}  # of weights, which layers may share
        with torch.inference_mode(False):
            for layer in module.modules():
                for held in (layer._parameters, layer._buffers):
                    self._kept.append((held, dict(held)))
                    held.update({name: _copy(tensor, device, copies) for name, tensor in held.items()})
        self._there = module

    def release(self) -> None:
        """Frees the device, once no gradient needs the weights there."""
        for held, kept in self._kept:
            held.update(kept)
        self._kept, self._there = [], None


def _copy(tensor: Tensor | None, device: torch.device, copies: dict[int, Any]) -> Any:
    """Returns a parameter or buffer on the device, the same one for the same tensor."""
    if tensor is not None and id(tensor) not in copies:
        copy = tensor.detach().to(device)
        copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return None if tensor is None else copies[id(tensor)]


class _Loan(ModelHook):
    """Calls `bring` before a module computes; diffusers calls it before `decode`, too."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Moves the module; its arguments stay as they are."""
        self._offload.bring(module)
        return args, kwargs
