"""Does it pay to choose the start? SVDD with and without, at equal denoiser rows, on the embedded model."""

import argparse
from pathlib import Path

import torch

from benchmarks.paired import PROMPTS, interval
from benchmarks.samplers import IMAGES, STEPS, draw
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import fit_budget
from svdd.samplers.svdd import SVDD
from svdd.values.posterior_mean import PosteriorMean

BUDGET = 200
HEADER = """# Choosing the start

The embedded model, T = {steps}, guidance scale 3, {prompts} prompts x {images} images, same seeds, at most {budget}
denoiser rows per image, alpha = 0. Differences are paired by prompt, with 95 % intervals (Student's t). Made by
`python -m benchmarks.choose_start`.

| eta | guide | best-of-N | SVDD | SVDD, choose_start | choose_start - SVDD | choose_start - best-of-N |
|---:|---|---:|---:|---:|---:|---:|
"""


def main() -> None:
    """Draws and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etas", nargs="+", type=float, default=[1.0, 0.3])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    value, prompts = PosteriorMean(), range(options.prompts)
    guides: list[Reward] = [Compressibility(), CLIPScore()]
    page = HEADER.format(steps=STEPS, prompts=len(prompts), images=IMAGES, budget=BUDGET)
    for eta in options.etas:
        diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=eta)
        for guide in guides:
            scores = []
            for sampler in (BestOfN(), SVDD(), SVDD(choose_start=True)):
                chosen = fit_budget(sampler, BUDGET, diffusion, value)
                scores.append(torch.tensor(draw(diffusion, chosen, guide, guides, prompts)["scores"][guide.name]))
            best_of_n, plain, with_start = scores
            means = " | ".join(f"{float(each.mean()):.3f}" for each in scores)
            gains = f"{interval(with_start, plain)} | {interval(with_start, best_of_n)}"
            page += f"| {eta:g} | {guide.name} | {means} | {gains} |\n"
            print(page.splitlines()[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
