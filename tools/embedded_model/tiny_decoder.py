"""Trains a tiny decoder for previews, distilled from the model's decoder on what the embedded models predict."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.rewards.clip import CLIPScore
from svdd.state.start import Start
from tools.embedded_model.training import fit, hold_then_cosine

__all__ = ["PredictionBatches", "TinyDecoderTraining", "collect", "make_tiny"]

STEPS, BATCH, WIDTH, CHAIN = 16000, 256, 24, 20
ASSETS = Path(__file__).parents[2] / "svdd" / "assets"
MODELS = {"emoji": (StableDiffusion, 3.0), "emoji-flow": (StableDiffusion3, 2.0)}


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


@torch.inference_mode()
def collect(prompts: list[str], device: str, at_once: int = 128) -> tuple[Tensor, Tensor]:
    """Draws the prompts with both embedded models; returns the predictions of x0 at every step, and their images.

    Returns:
        Latents, float16 [n, 16, 8, 8], and the full decoder's images, float16 [n, 3, 64, 64] in [0, 1], on `device`.
    """
    latents, images = [], []
    for name, (kind, scale) in MODELS.items():
        diffusion: LatentDiffusion = kind(name, CHAIN, guidance_scale=scale).to(device)
        for start in range(0, len(prompts), at_once):
            texts = prompts[start : start + at_once]
            state = Start(diffusion, texts, range(start, start + len(texts)))()
            while not state.done:
                latents.append(state.x0.half())
                images.append(diffusion.decode(state.x0).half())
                state = state.propose()
    return torch.cat(latents), torch.cat(images)


class PredictionBatches(IterableDataset):
    """An endless stream of (latents, images), shuffled."""

    def __init__(self, latents: Tensor, images: Tensor, batch_size: int) -> None:
        self.latents, self.images, self.batch_size = latents, images, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(self.latents), device=self.latents.device)
            for chosen in order.split(self.batch_size):
                yield self.latents[chosen].float(), self.images[chosen].float()


class TinyDecoderTraining(L.LightningModule):
    """Errors against the full decoder's image: L1, gradients, and 1 - cosine of the embeddings of the embedded CLIP.

    Args:
        steps: Optimiser steps in all.
        perceptual: Weight of 1 - cosine.
    """

    def __init__(self, steps: int = STEPS, perceptual: float = 0.5) -> None:
        super().__init__()
        self.steps, self.perceptual = steps, perceptual
        self.tiny, clip = make_tiny(), CLIPScore()
        clip.load()
        self.clip = (clip,)  # not in checkpoints

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of one batch of latents and images."""
        latents, target = batch
        self.clip[0].to(latents.device)
        drawn = self.tiny.decode(latents).sample.float() / 2 + 0.5
        error = drawn - target
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        own, wanted = (self.clip[0].image_features(images.clamp(0, 1)) for images in (drawn, target))
        far = (1 - (own * wanted).sum(-1)).mean()
        self.log("psnr", -10 * torch.log10(error.square().mean()))
        self.log("embedding", far)
        return 2 * error.abs().mean() + 0.8 * gradient + self.perceptual * far

    def configure_optimizers(self) -> dict:
        """AdamW; the rate is held for 40 % of the steps, then falls as a cosine."""
        optimizer = torch.optim.AdamW(self.tiny.decoder.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: hold_then_cosine(s, self.steps, 0.4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Collects, trains, and replaces the embedded weights, or those in `--output`."""
    from benchmarks.paired import PROMPTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--prompts", type=int, default=768)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=ASSETS / "emoji-tiny")
    options = parser.parse_args()
    texts = (ASSETS / "emoji_prompts.txt").read_text().splitlines()
    texts = [text for text in dict.fromkeys(texts) if text and text not in PROMPTS][: options.prompts]
    data = PredictionBatches(*collect(texts, options.device), options.batch_size)
    module = TinyDecoderTraining(options.steps)
    accelerator = "cpu" if options.device == "cpu" else "gpu"
    fit(module, DataLoader(data, batch_size=None), options.work / "tiny", options.steps, accelerator=accelerator)
    module.tiny.half().save_pretrained(options.output)


if __name__ == "__main__":
    main()
