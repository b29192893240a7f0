"""Trains a tiny decoder for previews, distilled from the model's decoder."""

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.embedded_model.training import fit, hold_then_cosine

__all__ = ["TinyDecoderTraining", "make_tiny"]

STEPS, BATCH, WIDTH = 1500, 16, 24
ASSETS = Path(__file__).parents[2] / "svdd" / "assets"


def make_tiny() -> AutoencoderTiny:
    """Returns an AutoencoderTiny of the embedded model's shapes; its unused encoder is minimal."""
    return AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 2, 1, 0),
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


class TinyDecoderTraining(L.LightningModule):
    """L1 and gradient error against the full decoder's image, on latents of scenes and on mixtures of two.

    Mixtures approximate posterior means, which are averages of clean latents.

    Args:
        steps: Optimiser steps in all.
    """

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.steps = steps
        self.tiny = make_tiny()
        self.teacher = (AutoencoderKL.from_pretrained(ASSETS / "emoji-sd" / "vae", torch_dtype=torch.float32).eval(),)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the loss of one batch of latents."""
        share = torch.rand(len(batch), 1, 1, 1) * (torch.rand(len(batch), 1, 1, 1) < 0.5)
        latents = (1 - share) * batch + share * batch.flip(0)
        with torch.no_grad():
            target = self.teacher[0].decode(latents).sample.clamp(-1, 1)
        error = self.tiny.decode(latents).sample - target
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        self.log("psnr", -10 * torch.log10(error.square().mean() / 4))
        return error.abs().mean() + 0.4 * gradient

    def configure_optimizers(self) -> dict:
        """AdamW; the rate is held for 40 % of the steps, then falls as a cosine."""
        optimizer = torch.optim.AdamW(self.tiny.decoder.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: hold_then_cosine(s, self.steps, 0.4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Latents(Dataset[Tensor]):
    """The training latents of the UNet."""

    def __init__(self, work: Path) -> None:
        self.latents = np.load(work / "latents.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.latents[index], dtype=np.float32))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    loader = DataLoader(Latents(options.work), BATCH, shuffle=True, drop_last=True)
    module = TinyDecoderTraining(options.steps)
    fit(module, loader, options.work / "tiny", options.steps)
    module.tiny.half().save_pretrained(ASSETS / "emoji-tiny")
