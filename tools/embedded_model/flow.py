"""Trains emoji-flow: a Stable Diffusion 3 transformer and its second text encoder, by rectified flow on scene latents.

The autoencoder of emoji-sd and the text tower of emoji-clip are used as they are. Runs on one GPU or on CPUs, for a
given time, and resumes where it stopped. Sources: Esser et al., Scaling Rectified Flow Transformers, 2024, arXiv
2403.03206 (architecture, times); Peebles and Xie, Scalable Diffusion Models with Transformers, 2023, arXiv 2212.09748
(modulation that starts at zero).
"""

import argparse
import math
import multiprocessing
from collections.abc import Iterator
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from lightning.pytorch.callbacks import Timer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tools.embedded_model.scenes import Scenes
from tools.embedded_model.training import fit, to_unit

__all__ = ["ASSETS", "FlowTraining", "ScenePool", "trained_parts"]

ASSETS = Path("svdd/assets")
POOL, WIDTH = 1_000_000, 144
LEARNING_RATE, WARM_UP, DECAY = 1.5e-3, 500, 0.999
T5_TOKENS = 256  # rows of zeros that diffusers' pipeline appends by default where T5 is absent
WITH_T5_TOKENS = 12  # every 12th batch has them


def trained_parts() -> nn.ModuleDict:
    """Returns the parts to train, `transformer` and `text_encoder_2`, as initialised."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=7,
        attention_head_dim=48,
        num_attention_heads=WIDTH // 48,
        joint_attention_dim=192 + 64,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128 + 64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    modulations = [
        norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)
    ]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    config = CLIPTextConfig.from_pretrained(ASSETS / "emoji-clip").to_dict()
    size = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64}
    config |= size | {"num_hidden_layers": 2, "num_attention_heads": 2}
    return nn.ModuleDict(
        {"transformer": transformer, "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config))}
    )


class ScenePool(IterableDataset):
    """Endless batches (latents, token ids) from a growing pool of encoded scenes, 10 % of them with empty captions.

    Worker processes draw the scenes; one chunk of a quarter of a batch joins the pool at each step, until it is full.

    Args:
        work: Folder of the sprites.
        batch_size: Rows of a batch.
        workers: Processes that draw.
        size: Scenes in the full pool.
        device: Device of the pool and of the autoencoder.
    """

    def __init__(self, work: Path, batch_size: int, workers: int, size: int, device: str) -> None:
        self.batch_size, self.chunk, self.device = batch_size, max(1, batch_size // 4), device
        chunks = -(-size // self.chunk)
        self.processes = multiprocessing.get_context("fork").Pool(workers, _start, (work, self.chunk))
        seed = np.random.SeedSequence().entropy
        self.drawn = self.processes.imap_unordered(_draw, ((seed, number) for number in range(chunks)))
        self.latents = torch.empty(chunks * self.chunk, 16, 8, 8, dtype=torch.float16, device=device)
        self.tokens = torch.empty(chunks * self.chunk, 16, dtype=torch.int64, device=device)
        self.filled = 0
        self.vae = AutoencoderKL.from_pretrained(ASSETS / "emoji-sd/vae", torch_dtype=torch.float32).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "emoji-sd/tokenizer")

    def tokenize(self, captions: list[str]) -> Tensor:
        """Returns the token ids of captions, [n, 16]."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return tokens.to(self.device)

    @torch.no_grad()
    def grow(self, wait: bool) -> None:
        """Encodes one more chunk, if the pool is not full and one is ready."""
        if self.filled == len(self.latents):
            return
        try:
            images, captions = self.drawn.next(timeout=None if wait else 0)
        except multiprocessing.TimeoutError:
            return
        chunk = slice(self.filled, self.filled + len(images))
        latents = self.vae.encode(to_unit(torch.from_numpy(images).to(self.device)) * 2 - 1).latent_dist.mean
        self.latents[chunk], self.tokens[chunk] = latents.half(), self.tokenize(captions)
        self.filled = chunk.stop

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = self.tokenize([""])
        while self.filled < min(10 * self.batch_size, len(self.latents)):
            self.grow(wait=True)
        while True:
            self.grow(wait=False)
            rows = torch.randint(self.filled, (self.batch_size,), device=self.device)
            blank = torch.rand(self.batch_size, 1, device=self.device) < 0.1
            yield self.latents[rows].float(), torch.where(blank, empty, self.tokens[rows])


_worker: dict[str, Any] = {}  # what a process that draws has


def _start(work: Path, chunk: int) -> None:
    _worker.update(scenes=Scenes(work), chunk=chunk)


def _draw(seed: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    return _worker["scenes"].batch(_worker["chunk"], np.random.default_rng(seed))


class FlowTraining(L.LightningModule):
    """Regression on noise - data; `average` holds the exponential moving average that is exported.

    The learning rate falls as a cosine over the time that the trainer's timer allows. The text states are those of
    `StableDiffusion3Pipeline.encode_prompt`: the last but one layers of both text encoders side by side, then rows of
    zeros in place of T5, none in most batches and `T5_TOKENS` in the others.

    Args:
        compiled: Whether to compile the transformer's blocks.
    """

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        self.parts = trained_parts()
        self.average = deepcopy(self.parts).requires_grad_(False)
        text = CLIPTextModelWithProjection.from_pretrained(ASSETS / "emoji-clip", dtype=torch.float32)
        self.text_encoder = text.requires_grad_(False)
        for block in self.parts["transformer"].transformer_blocks if compiled else ():
            block.compile(dynamic=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean squared error of the velocity, at stratified times of a wide logit-normal law."""
        latents, tokens = batch
        zeros = T5_TOKENS if batch_idx % WITH_T5_TOKENS == WITH_T5_TOKENS - 1 else 0
        if zeros:
            latents, tokens = latents[: -(-len(latents) // 4)], tokens[: -(-len(tokens) // 4)]
        n = len(latents)
        quantiles = (torch.arange(n, device=self.device) + torch.rand(n, device=self.device)) / n
        t = torch.sigmoid(1.4 * torch.special.ndtri(quantiles.clamp(1e-5, 1 - 1e-5)))
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        first, second = (
            encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.parts["text_encoder_2"])
        )
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
        states = nn.functional.pad(states, (0, 0, 0, zeros))
        with torch.compiler.set_stance("force_eager" if zeros else "default"):  # one shape is compiled
            velocity = self.parts["transformer"](noisy, states, pooled, t * 1000, return_dict=False)[0]
        loss = (velocity.float() - (noise - latents)).square().mean()
        self.log("loss_t5" if zeros else "loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate: a linear warm-up over steps, times a half cosine over the trainer's time."""
        timer = next(callback for callback in self.trainer.callbacks if isinstance(callback, Timer))
        spent = timer.time_elapsed() / (timer.time_elapsed() + timer.time_remaining())
        factor = min(1.0, (self.global_step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, spent)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = LEARNING_RATE * factor

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Steps, then updates the moving average."""
        super().optimizer_step(*args, **kwargs)
        decay = min(DECAY, (1 + self.global_step) / (10 + self.global_step))
        averages, currents = list(self.average.parameters()), list(self.parts.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, currents, 1 - decay)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the trained parts."""
        return torch.optim.AdamW(self.parts.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.99))


class KeepAverage(L.Callback):
    """Writes the averaged parts in float16 every minute and at the end.

    Args:
        path: The safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: FlowTraining, *args: object) -> None:
        """Writes the file if a minute has passed."""
        elapsed = next(callback for callback in trainer.callbacks if isinstance(callback, Timer)).time_elapsed()
        if elapsed >= self.kept + 60:
            self.write(module)
            self.kept = elapsed
            print(f"{elapsed:.0f} s, step {trainer.global_step}: {trainer.callback_metrics}", flush=True)

    def on_train_end(self, trainer: L.Trainer, module: FlowTraining) -> None:
        """Writes the file."""
        self.write(module)

    def write(self, module: FlowTraining) -> None:
        """Writes the averaged parts."""
        state = {name: value.half().contiguous() for name, value in module.average.state_dict().items()}
        save_file(state, self.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="takes checkpoint, averaged weights and log (WORK/flow)")
    parser.add_argument("--seconds", type=float, default=6 * 3600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder or arguments.work / "flow"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    pool = ScenePool(arguments.work, arguments.batch_size, arguments.workers, arguments.pool, arguments.device)
    fit(
        FlowTraining(arguments.compile),
        DataLoader(pool, batch_size=None),
        folder,
        max_time=timedelta(seconds=arguments.seconds),
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        precision="bf16-mixed",
        callbacks=[KeepAverage(folder / "average.safetensors")],
    )
    pool.processes.terminate()
