"""The framework's overhead: plain sampling against diffusers' own loop, and the unaccounted share of an SVDD run.

Writes benchmarks/overhead.md. The two loops alternate; the ratio is between their medians.
"""

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

PROMPTS = ["red apple", "panda on a blue background", "rocket", "house on a green background"]
SEEDS = [0, 1, 2, 3]


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


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    folder = str(files("svdd") / "assets" / "emoji-sd")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    diffusion = StableDiffusion("emoji", options.steps, guidance_scale=3.0, eta=1.0)
    pipeline_seconds(pipeline, options.steps), unguided_seconds(diffusion)  # warm up
    pairs = [(unguided_seconds(diffusion), pipeline_seconds(pipeline, options.steps)) for _ in range(options.repeats)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    lines = [
        "# Overhead on the embedded model",
        "",
        f"{len(PROMPTS)} prompts at once, T = {options.steps}, {torch.get_num_threads()} CPU threads. "
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
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
