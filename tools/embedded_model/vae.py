"""Trains the autoencoder: 64 px RGB to 8 x 8 latents of 16 channels and back."""

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.embedded_model.training import SceneBatches, fit, hold_then_cosine, to_unit

__all__ = ["VAETraining", "export_vae"]

STEPS, CROP_STEPS = 5200, 4400


class VAETraining(L.LightningModule):
    """L1, squared and gradient error, with a light Kullback-Leibler term.

    The first steps use 32 px crops (four times the images per second), the last ones whole scenes.

    Args:
        steps: Optimiser steps in all.
        crop_steps: Steps on crops.
    """

    def __init__(self, steps: int = STEPS, crop_steps: int = CROP_STEPS) -> None:
        super().__init__()
        self.steps, self.crop_steps = steps, crop_steps
        self.vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=64,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Returns the loss of one batch of scenes."""
        images = to_unit(batch[0]) * 2 - 1
        if self.global_step < self.crop_steps:
            top, left = torch.randint(0, 33, (2,)).tolist()
            images = images[..., top : top + 32, left : left + 32]
        else:
            images = images[: len(images) // 4]
        posterior = self.vae.encode(images).latent_dist
        error = self.vae.decode(posterior.sample()).sample - images
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        squared = error.square().mean()
        loss = error.abs().mean() + 2 * squared + 0.4 * gradient + 1e-4 * posterior.kl().mean() / 64
        self.log_dict({"loss": loss, "psnr": -10 * torch.log10(squared / 4)})
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW; the rate is held for 40 % of the steps, then falls as a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: hold_then_cosine(s, self.steps, 0.4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def export_vae(checkpoint: Path, work: Path) -> AutoencoderKL:
    """Returns the trained autoencoder with each latent channel at mean 0 and variance 1 over scenes.

    The channel statistics are folded into the two 1x1 convolutions around the latents, so `scaling_factor` stays 1.

    Args:
        checkpoint: Checkpoint of the training.
        work: Folder of the sprites.
    """
    module = VAETraining()
    module.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"])
    vae = module.vae.eval()
    images, _ = SceneBatches(work, 1000, seed=1).scenes.batch(1000, np.random.default_rng(1))
    latents = torch.cat(
        [vae.encode(part * 2 - 1).latent_dist.mean for part in to_unit(torch.from_numpy(images)).split(100)]
    )
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = vae.config.latent_channels
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[channels:] -= 2 * std.log()  # the second half is the log-variance
    decode.bias += torch.einsum("oi,i->o", decode.weight[:, :, 0, 0], mean)
    decode.weight *= std[None, :, None, None]
    return vae


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    fit(VAETraining(), SceneBatches(work, 24, seed=0).loader(), work / "vae", STEPS)
