"""Trains the denoiser on precomputed latents: v-prediction, min-SNR weights, classifier-free dropout, averaged weights.

Sources: Salimans and Ho, Progressive Distillation, 2022, arXiv 2202.00512 (v-prediction); Hang et al., Efficient
Diffusion Training via Min-SNR Weighting, 2023, arXiv 2303.09556.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import lightning as L
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tools.embedded_model.clip import CLIPTraining, build_tokenizer
from tools.embedded_model.scenes import Scenes
from tools.embedded_model.training import fit, hold_then_cosine, to_unit
from tools.embedded_model.vae import export_vae

__all__ = ["SCHEDULER", "UNetTraining", "precompute"]

STEPS, POOL, MIN_SNR = 4200, 80_000, 5.0
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


@torch.no_grad()
def precompute(work: Path) -> None:
    """Writes the memory-mapped training files, unless they exist.

    `latents.npy` [POOL, 16, 8, 8], `text_index.npy` [POOL] with `captions.json`, and `texts.npy` [captions, 16, 192];
    the first caption is the empty one.

    Args:
        work: Folder with the trained autoencoder and CLIP.
    """
    if not (work / "captions.json").exists():
        _precompute_latents(work)
    if not (work / "texts.npy").exists():
        _precompute_texts(work)


def _precompute_latents(work: Path) -> None:
    vae, scenes, rng = export_vae(work / "vae/last.ckpt", work), Scenes(work), np.random.default_rng(7)
    latents = np.lib.format.open_memmap(work / "latents.npy", "w+", np.float16, (POOL, 16, 8, 8))
    index, known = np.zeros(POOL, np.int64), {"": 0}
    for start in range(0, POOL, 200):
        images, captions = scenes.batch(200, rng)
        latents[start : start + 200] = vae.encode(to_unit(torch.from_numpy(images)) * 2 - 1).latent_dist.mean.half()
        index[start : start + 200] = [known.setdefault(caption, len(known)) for caption in captions]
    latents.flush()
    np.save(work / "text_index.npy", index)
    (work / "captions.json").write_text(json.dumps(list(known)))


def _precompute_texts(work: Path) -> None:
    tokenizer = build_tokenizer(work)
    clip = CLIPTraining("clip", tokenizer)
    clip.load_state_dict(torch.load(work / "clip/last.ckpt", weights_only=True, map_location="cpu")["state_dict"])
    text = clip.clip.text_model.eval()
    captions = json.loads((work / "captions.json").read_text())
    states = []
    for start in range(0, len(captions), 500):
        part = captions[start : start + 500]
        tokens = tokenizer(part, padding="max_length", truncation=True, return_tensors="pt")
        states.append(text(tokens.input_ids).last_hidden_state.half())
    np.save(work / "texts.npy", torch.cat(states).numpy())


class _Latents(IterableDataset):
    """Endless batches (latents, text states) from the precomputed pool, different on every rank."""

    def __init__(self, work: Path, batch_size: int) -> None:
        self.work, self.batch_size = work, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        latents, texts = (np.load(self.work / name, mmap_mode="r") for name in ("latents.npy", "texts.npy"))
        index = np.load(self.work / "text_index.npy")
        rng = np.random.default_rng(np.random.SeedSequence().entropy)
        while True:
            rows = rng.integers(len(latents), size=self.batch_size)
            captions = np.where(rng.random(self.batch_size) < 0.1, 0, index[rows])
            yield torch.from_numpy(latents[rows]).float(), torch.from_numpy(texts[captions]).float()


class UNetTraining(L.LightningModule):
    """Regression on v with min-SNR weights; `average` holds the exponential moving average that is exported.

    Args:
        steps: Optimiser steps in all; the learning rate falls as a cosine over the last 60 % of them.
    """

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.steps = steps
        self.scheduler = DDIMScheduler(**SCHEDULER)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(96, 144),
            layers_per_block=1,
            cross_attention_dim=192,
            attention_head_dim=(4, 6),
            norm_num_groups=16,
        )
        self.unet.set_attn_processor(AttnProcessor())  # faster to train than SDPA at this size
        self.average = deepcopy(self.unet).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the weighted regression loss, at stratified times."""
        latents, texts = batch
        n = len(latents)
        t = ((torch.arange(n) + torch.rand(n)) / n * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, t)
        error = self.unet(noisy, t, texts).sample - self.scheduler.get_velocity(latents, noise, t)
        signal = self.scheduler.alphas_cumprod[t]
        snr = signal / (1 - signal)
        loss = (error.square().mean((1, 2, 3)) * snr.clamp(max=MIN_SNR) / (snr + 1)).mean()
        self.log("loss", loss)
        return loss

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Steps, then updates the moving average with decay 0.999, smaller at the start."""
        super().optimizer_step(*args, **kwargs)
        decay = min(0.999, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            averages, currents = list(self.average.parameters()), list(self.unet.parameters())
            torch._foreach_lerp_(averages, currents, 1 - decay)

    def configure_optimizers(self) -> dict:
        """AdamW; a constant rate, then a cosine."""
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=9e-4, weight_decay=0.01, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: hold_then_cosine(s, self.steps, 0.4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--devices", type=int, default=2)
    arguments = parser.parse_args()
    precompute(arguments.work)
    loader = DataLoader(_Latents(arguments.work, 64 // arguments.devices), batch_size=None)
    fit(UNetTraining(arguments.steps), loader, arguments.work / "unet", arguments.steps, arguments.devices)
