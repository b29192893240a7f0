"""Small decoders for previews, in the format of diffusers' AutoencoderTiny (TAESD)."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from svdd import UserError

__all__ = ["TinyDecoder"]


class TinyDecoder(nn.Module):
    """The decoding half of an AutoencoderTiny.

    Args:
        source: A folder that AutoencoderTiny.save_pretrained wrote, or a hub name such as `madebyollin/taesd`.
        latent_channels: Channels of the latents that it will get.
        dtype: The floating-point type to load it in.

    Raises:
        UserError: If it cannot be loaded, or is for other latents.
    """

    def __init__(self, source: str, latent_channels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        local = Path(source).expanduser()
        if (local.exists() or source.startswith((".", "/", "~"))) and not (local / "config.json").is_file():
            raise UserError(
                f"decoder={source!r} has no config.json; expected `tiny`, a folder written by "
                "AutoencoderTiny.save_pretrained, or a hub name such as madebyollin/taesd"
            )
        try:
            vae = AutoencoderTiny.from_pretrained(source, torch_dtype=dtype)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"decoder={source!r} cannot be loaded as an AutoencoderTiny: {reason}") from error
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
