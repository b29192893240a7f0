"""SVDD, best-of-N and plain sampling on the embedded model: same prompts, same seeds.

Writes benchmarks/guidance.md: for each guide reward the mean under each sampler, the paired differences with 95 %
intervals (Student's t over prompts; the images of a prompt are averaged first), the held-out judge and the cost.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.paired import PROMPTS as ALL_PROMPTS
from benchmarks.paired import interval
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

PROMPTS = ALL_PROMPTS[:16]


@torch.no_grad()
def measure(sampler: Sampler, guide: Reward, others: list[Reward], images: int, steps: int) -> dict:
    """Samples `images` images of every prompt; returns all scores [prompts, images] and the ledger."""
    diffusion = StableDiffusion("emoji", num_inference_steps=steps, guidance_scale=3.0, eta=1.0)
    value = PosteriorMean()
    value.bind(guide, diffusion)
    scores: dict[str, list] = {reward.name: [] for reward in (guide, *others)}
    rows = seconds = 0.0
    for start in range(0, len(PROMPTS), 4):
        prompts = [prompt for prompt in PROMPTS[start : start + 4] for _ in range(images)]
        begin = Start(diffusion, prompts, range(start * images, start * images + len(prompts)))
        ledger = begin.context.ledger
        with ledger.timed("total_seconds", diffusion.device):
            final = sampler(begin, value)
            pictures = final.images
        for reward in (guide, *others):
            scores[reward.name].append(reward.score(pictures, prompts).view(-1, images))
        rows, seconds = rows + ledger.denoiser_rows, seconds + ledger.total_seconds
    count = len(PROMPTS) * images
    return {
        "scores": {name: torch.cat(parts) for name, parts in scores.items()},
        "rows": rows / count,
        "seconds": seconds / count,
    }


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    n = options.candidates
    samplers = {"unguided": Unguided(), f"best of {n}": BestOfN(n), f"SVDD, M = {n}": SVDD(n)}
    clip, judge, jpeg = CLIPScore(), CLIPScore("emoji-judge"), Compressibility()
    lines = [
        "# Guidance on the embedded model",
        "",
        f"{len(PROMPTS)} prompts x {options.images} images, T = {options.steps}, guidance scale 3, eta 1, same seeds. "
        "Differences are paired by prompt, with 95 % intervals. `CLIPScore-judge` is held out: a second CLIP, trained "
        "separately. Made by `python -m benchmarks.guidance`.",
    ]
    for guide, others in ((jpeg, [clip, judge]), (clip, [judge, jpeg])):
        results = {
            name: measure(sampler, guide, others, options.images, options.steps) for name, sampler in samplers.items()
        }
        names = [guide.name, *(reward.name for reward in others)]
        lines += ["", f"## Guide: {guide.name}", ""]
        lines += [f"| sampler | {' | '.join(names)} | denoiser rows / image | seconds / image |"]
        lines += ["|---|" + "---:|" * (len(names) + 2)]
        for name, result in results.items():
            means = " | ".join(f"{float(result['scores'][key].mean()):.3f}" for key in names)
            lines.append(f"| {name} | {means} | {result['rows']:.0f} | {result['seconds']:.2f} |")
        lines += ["", f"| paired difference | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        labels = list(samplers)
        for first, second in ((2, 0), (2, 1), (1, 0)):
            a, b = results[labels[first]]["scores"], results[labels[second]]["scores"]
            cells = " | ".join(interval(a[key], b[key]) for key in names)
            lines.append(f"| {labels[first]} - {labels[second]} | {cells} |")
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
