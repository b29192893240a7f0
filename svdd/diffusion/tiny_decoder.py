"""Small decoders for previews, in the format of diffusers' AutoencoderTiny (TAESD)."""

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import loading, locate

__all__ = ["TinyDecoder"]


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny.

    Args:
        source: A folder saved by AutoencoderTiny.save_pretrained, or a hub name such as `madebyollin/taesd`.
        latent_channels: Channels of the latents to decode.
        dtype: The floating-point type of the weights.

    Raises:
        UserError: If it cannot be loaded, or is for latents with other channels.
    """

    def __init__(self, source: str, latent_channels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        expected = "`tiny`, a folder written by AutoencoderTiny.save_pretrained, or a hub name: madebyollin/taesd"
        with loading(f"decoder={source!r}"):
            vae = AutoencoderTiny.from_pretrained(locate("decoder", source, "config.json", expected), torch_dtype=dtype)
        if vae.config.latent_channels != latent_channels:
            raise UserError(
                f"decoder={source!r} is for latents of {vae.config.latent_channels} channels; this model has "
                f"{latent_channels}"
            )
        self.decoder = vae.decoder.eval()
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, x0: Tensor) -> Tensor:
        """Turns latents [n, c, h, w] into images, float32 [n, 3, H, W] in [0, 1]."""
        dtype = next(self.decoder.parameters()).dtype
        images = self.decoder(x0.to(dtype) / self.scaling_factor)
        return (images * 0.5 + 0.5).clamp(0, 1).float()
