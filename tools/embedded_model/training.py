"""Shared by the training runs: an endless scene data set, a resumable trainer, a learning-rate shape."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tools.embedded_model.scenes import Scenes

__all__ = ["SceneBatches", "fit", "hold_then_cosine", "to_unit"]


class SceneBatches(IterableDataset):
    """An endless stream of (images uint8 [n, 64, 64, 3], captions), different on every rank and after every restart.

    Args:
        work: Folder of the sprites.
        batch_size: Scenes in a batch.
        seed: First part of the generator's seed; the others are the process rank and a random number.
    """

    def __init__(self, work: Path, batch_size: int, seed: int) -> None:
        self.scenes, self.batch_size, self.seed = Scenes(work), batch_size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        rng = np.random.default_rng([self.seed, torch.initial_seed() % 2**32, np.random.SeedSequence().entropy % 2**32])
        while True:
            images, captions = self.scenes.batch(self.batch_size, rng)
            yield torch.from_numpy(images), captions

    def loader(self) -> DataLoader:
        """Returns a loader that yields the batches as they are."""
        return DataLoader(self, batch_size=None)


def to_unit(images: Tensor) -> Tensor:
    """Turns uint8 [n, h, w, 3] into float [n, 3, h, w] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def hold_then_cosine(step: int, total: int, hold: float, warmup: int = 200) -> float:
    """Returns the learning-rate factor: a linear warm-up, level until `hold * total`, then a half cosine to 0.02."""
    if step < warmup:
        return (step + 1) / warmup
    progress = max(0.0, step / total - hold) / (1 - hold)
    return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def fit(
    module: L.LightningModule,
    data: DataLoader,
    folder: Path,
    max_steps: int = -1,
    devices: int = 1,
    accelerator: str = "cpu",
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> None:
    """Trains to `max_steps`, from the folder's last checkpoint if there is one.

    Args:
        module: Model to train.
        data: Training batches.
        folder: Takes `last.ckpt` and a CSV log.
        max_steps: Optimiser steps in all.
        devices: CPU processes that share each step (distributed data parallel over gloo).
        accelerator: `cpu` or `gpu`.
        callbacks: Callbacks besides the checkpoint.
        **options: Other arguments of the Trainer.
    """
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        logger=CSVLogger(folder.parent, name=folder.name, version="log"),
        callbacks=[
            ModelCheckpoint(
                folder, save_last=True, save_top_k=0, every_n_train_steps=500, enable_version_counter=False
            ),
            *callbacks,
        ],
        gradient_clip_val=1.0,
        log_every_n_steps=50,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
