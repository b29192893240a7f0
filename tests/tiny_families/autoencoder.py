"""The autoencoder that most families share, in small."""

from typing import Any

from diffusers import AutoencoderKL

__all__ = ["small_autoencoder"]


def small_autoencoder(latent_channels: int, **settings: Any) -> AutoencoderKL:
    """Returns a random autoencoder that scales pictures down by 8; further settings are those of its configuration."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    )
