"""Precision and memory format in which parts of a model compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["float32_default", "order_weights", "without_autocast"]


@contextmanager
def without_autocast(kind: str, wanted: bool = True) -> Iterator[None]:
    """Switches autocast off on a kind of device, for parts that overflow in float16; only if `wanted`."""
    if not wanted or not torch.amp.is_autocast_available(kind):
        yield
    else:
        with torch.autocast(kind, enabled=False):
            yield


@contextmanager
def float32_default() -> Iterator[None]:
    """Makes float32 the default type of new tensors, such as timesteps and log-weights.

    The precisions `16-true` and `bf16-true` of a Trainer change it, and the pipelines of diffusers do not.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def order_weights(part: nn.Module, device: torch.device, decodes: bool) -> None:
    """Orders the weights of convolutions for the precision of a part and the device on which it computes.

    With channels last, an image is not copied to another order before a convolution. Sums are added in another order,
    so the last bits of a result differ. On a CPU, decoders are faster with channels last, and a UNet in float32 alone
    (docs/reference/models.md). On a CUDA device, half-precision kernels work with channels last. A part without flat
    convolutions, or with convolutions in time as well, stays as it is.

    Args:
        part: A network or an autoencoder.
        device: Where it computes, which is not where its weights are if it is offloaded.
        decodes: Whether it turns latents into images.
    """
    layers = [layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    if not layers or any(isinstance(layer, nn.Conv3d) for layer in part.modules()):
        return
    half = layers[0].weight.dtype in (torch.float16, torch.bfloat16)
    last = {"cpu": decodes or not half, "cuda": half}.get(device.type, False)
    memory_format = torch.channels_last if last else torch.contiguous_format
    for layer in layers:
        layer.to(memory_format=memory_format)
