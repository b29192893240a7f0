"""The order in memory in which the weights of flat convolutions compute fastest.

With channels last, a convolution needs no copy of its input in another order. Sums are added in another order, too, so
the last bits of a result differ.
"""

import torch
from torch import nn

__all__ = ["order_weights"]


def order_weights(part: nn.Module, device: torch.device, decodes: bool) -> None:
    """Orders the weights of a network or decoder for its precision and the device on which it computes.

    On a CPU, decoders are faster with channels last, and a UNet in float32 alone (docs/models.md). On a CUDA device,
    half-precision kernels work with channels last. A part without flat convolutions, or with convolutions in time as
    well, stays as it is.

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
