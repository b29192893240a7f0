"""The framework's overhead: plain sampling against diffusers' own loop, and the unaccounted share of SVDD's runs.

Writes benchmarks/overhead.md. What is compared alternates in one process; ratios are between medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.function import FunctionReward
from svdd.rewards.jpeg import Compressibility
from svdd.runs.prompts import PromptDataModule
from svdd.runs.writer import RunWriter
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

PROMPTS = ["red apple", "panda on a blue background", "rocket", "house on a green background"]
SEEDS = [0, 1, 2, 3]
BATCHES = (1, 8, 32)
SLEEP, THREADS = 0.05, 8
NOTES = (
    f"`Trainer.predict` draws {max(BATCHES)} prompts with `RunWriter`, PNG files included, and is timed from the first "
    "batch until all are on disk. The scores of the finished images count as outside.",
    f"The sleeping reward is a `FunctionReward` that takes one image at a time, for {len(PROMPTS)} prompts at once.",
)


def pipeline_seconds(pipeline: StableDiffusionPipeline, steps: int) -> float:
    """Returns the wall time of diffusers' own call."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    start = time.perf_counter()
    pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=3.0, eta=1.0, generator=generators, output_type="pt")
    return time.perf_counter() - start


@torch.no_grad()
def unguided_seconds(diffusion: StableDiffusion) -> float:
    """Returns the wall time of `Unguided` on the same prompts."""
    start = time.perf_counter()
    _ = Unguided()(Start(diffusion, PROMPTS, SEEDS), PosteriorMean()).images
    return time.perf_counter() - start


@torch.no_grad()
def own_share(diffusion: StableDiffusion, reward: object, candidates: int) -> tuple[float, float]:
    """Returns the wall time of an SVDD run and the share of it outside network, decoder and reward."""
    value = PosteriorMean()
    value.bind(reward, diffusion)
    start = Start(diffusion, PROMPTS, SEEDS)
    ledger = start.context.ledger
    with ledger.timed("total_seconds", diffusion.device):
        _ = SVDD(candidates)(start, value).images
    named = ledger.denoiser_seconds + ledger.decoder_seconds + ledger.reward_seconds
    return ledger.total_seconds, 1 - named / ledger.total_seconds


class Timed(GuidedDiffusion):
    """Adds up the time of the text encoder, and of network, decoder and reward as the ledgers have it."""

    named = 0.0

    def predict_step(self, batch: list[Any], batch_idx: int) -> Any:
        """Draws the batch as a run does."""
        with self._timed(self.diffusion, "encode"):
            prediction = super().predict_step(batch, batch_idx)
        assert self.ledger is not None
        self.named += self.ledger.denoiser_seconds + self.ledger.decoder_seconds + self.ledger.reward_seconds
        return prediction

    @contextmanager
    def _timed(self, owner: Any, name: str) -> Iterator[None]:
        function = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.named += time.perf_counter() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)


class Clock(L.Callback):
    """Measures the wall time from the first batch until all are on disk."""

    start = seconds = 0.0

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts."""
        self.start = time.perf_counter()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops; the writer's hook has waited for the last batch."""
        self.seconds = time.perf_counter() - self.start


def run_share(diffusion: StableDiffusion, prompts: list[str], batch: int, candidates: int) -> tuple[float, float]:
    """Returns the seconds of `Trainer.predict` for an image, and their share outside the parts that compute."""
    module, clock = Timed(Compressibility(), diffusion, SVDD(candidates)), Clock()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [RunWriter(Path(folder) / "run"), clock]
        trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
        trainer.predict(module, PromptDataModule(prompts, batch), return_predictions=False)
        written = len(list(Path(folder).glob("run/images/**/*.png")))
    if written != len(prompts):
        raise RuntimeError(f"{written} of {len(prompts)} images were written")
    return clock.seconds / len(prompts), 1 - module.named / clock.seconds


def sleeping(seconds: float, threads: int) -> FunctionReward:
    """Returns a reward that waits for each image, as one that asks a server does, and scores its brightness."""

    def reward(image: Image.Image, prompt: str) -> float:
        time.sleep(seconds)
        return float(np.asarray(image).mean())

    return FunctionReward(reward, one_by_one=True, threads=threads)


@torch.no_grad()
def sleeping_cost(diffusion: StableDiffusion, threads: int, candidates: int, repeats: int) -> float:
    """Returns the wall time that a sleep of `SLEEP` in the reward adds for an image that is scored, in seconds."""
    times: dict[float, list[float]] = {0.0: [], SLEEP: []}
    for _ in range(repeats):
        for seconds, found in times.items():
            value = PosteriorMean()
            value.bind(sleeping(seconds, threads), diffusion)
            start, begun = Start(diffusion, PROMPTS, SEEDS), time.perf_counter()
            _ = SVDD(candidates)(start, value).images
            found.append((time.perf_counter() - begun) / start.context.ledger.reward_calls)
    return statistics.median(times[SLEEP]) - statistics.median(times[0.0])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--short_steps", type=int, default=10, help="of the runs of Trainer.predict and with sleep")
    parser.add_argument("--short_repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    folder = str(files("svdd") / "assets" / "emoji-sd")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    diffusion = StableDiffusion("emoji", options.steps, guidance_scale=3.0, eta=1.0)
    pipeline_seconds(pipeline, options.steps), unguided_seconds(diffusion)  # warm up
    pairs = [(unguided_seconds(diffusion), pipeline_seconds(pipeline, options.steps)) for _ in range(options.repeats)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    threads = torch.get_num_threads()
    lines = [
        "# Overhead on the embedded model",
        "",
        f"{len(PROMPTS)} prompts at once, T = {options.steps}, {threads} CPU thread{'s' * (threads > 1)}. "
        "Made by `python -m benchmarks.overhead`.",
        "",
        "| measurement | value |",
        "|---|---:|",
        f"| `Unguided` over `StableDiffusionPipeline`, ratio of medians of {options.repeats} alternating runs "
        f"| {ours / theirs:.3f} |",
    ]
    for reward in (Compressibility(), CLIPScore()):
        _, share = own_share(diffusion, reward, options.candidates)
        lines.append(
            f"| share of an SVDD run (M = {options.candidates}, {reward.name}) outside network, decoder and reward "
            f"| {100 * share:.2f} % |"
        )
    short = StableDiffusion("emoji", options.short_steps, guidance_scale=3.0, eta=1.0)
    prompts = [f"{PROMPTS[k % len(PROMPTS)]}, number {k}" for k in range(max(BATCHES))]
    run_share(short, prompts[:1], 1, options.candidates)  # warm up
    for batch in BATCHES:
        seconds, share = run_share(short, prompts, batch, options.candidates)
        lines.append(
            f"| share of `Trainer.predict` (batches of {batch}, M = {options.candidates}, T = {options.short_steps}, "
            f"Compressibility, {1000 * seconds:.0f} ms an image) outside network, decoder, reward and text encoder "
            f"| {100 * share:.2f} % |"
        )
    for number in (0, THREADS):
        cost = sleeping_cost(short, number, options.candidates, options.short_repeats)
        lines.append(
            f"| wall time that a sleep of {1000 * SLEEP:.0f} ms in the reward of each image adds per scored image, "
            f"`threads={number}` | {1000 * cost:.1f} ms |"
        )
    text = "\n".join([*lines, "", *NOTES]) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
