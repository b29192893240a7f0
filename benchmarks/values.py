"""Learned value against posterior mean on the embedded model: correlation by step, reward and wall time.

Writes benchmarks/values.md and docs/images/calibration.png. The value is the one that ships with svdd, unless
`--pretrained` names another.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import PROMPTS, interval
from svdd.calibration import measure, plot
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.values.base import Value
from svdd.values.latent_conv import LatentConvValue
from svdd.values.posterior_mean import PosteriorMean

STEPS, AT_ONCE = 25, 4


@torch.no_grad()
def correlations(diffusion: StableDiffusion, values: dict[str, Value], images: int) -> dict[str, Any]:
    """Asks all values about the same fresh chains and returns a calibration table for each."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in values}
    rewards = []
    for k, prompt in enumerate(PROMPTS):
        state = diffusion.start([prompt] * images, range(5000 + k * images, 5000 + (k + 1) * images))
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in values}
        while not state.done:
            if state.i > 0:
                for name, value in values.items():
                    columns[name].append(value(state))
            state = state.propose()
        rewards.append(state.scores(next(iter(values.values())).reward))
        for name, parts in columns.items():
            seen[name].append(torch.stack(parts, 1))
    prompts = torch.arange(len(PROMPTS)).repeat_interleave(images)
    end = torch.cat(rewards).double()
    return {name: measure(torch.cat(parts).double(), end, prompts) for name, parts in seen.items()}


@torch.no_grad()
def draw(
    diffusion: StableDiffusion, sampler: Sampler, value: Value, images: int, prompts: Any = PROMPTS
) -> dict[str, Any]:
    """Draws pictures and returns guide scores [prompts, images], CLIP scores, rows and seconds per image."""
    guide, clip = value.reward, CLIPScore()
    scores, held_out, rows, seconds = [], [], 0.0, 0.0
    for start in range(0, len(prompts), AT_ONCE // images):
        texts = [prompt for prompt in prompts[start : start + AT_ONCE // images] for _ in range(images)]
        state = diffusion.start(texts, [1000 * start + k for k in range(len(texts))], sampler.start_particles)
        began = time.perf_counter()
        final = sampler.sample(state, value)
        pictures = final.images
        seconds += time.perf_counter() - began
        rows += state.context.ledger.denoiser_rows
        scores.append(guide.score(pictures, texts).view(-1, images))
        held_out.append(clip.score(pictures, texts).view(-1, images))
    count = len(prompts) * images
    return {"guide": torch.cat(scores), "clip": torch.cat(held_out), "rows": rows / count, "seconds": seconds / count}


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", default="emoji-compressibility")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    m, images = options.candidates, options.images
    diffusion, reward = StableDiffusion("emoji", STEPS, guidance_scale=3.0, eta=1.0), Compressibility()
    learned, mean = LatentConvValue(pretrained=options.pretrained), PosteriorMean()
    for value in (learned, mean):
        value.bind(reward)
        value.prepare(diffusion)
        value.eval()

    tables = correlations(diffusion, {"LatentConvValue": learned, "PosteriorMean": mean}, images=4)
    plot(
        Path("docs/images/calibration.png"),
        tables,
        f"Compressibility on the embedded model, {4 * len(PROMPTS)} fresh chains",
    )

    first = PROMPTS[: 2 * AT_ONCE]
    draw(diffusion, SVDD(m), learned, 1, first[:AT_ONCE])  # warm up
    times = {"learned": [], "mean": [], "chain": []}  # alternating, so that a busy machine is as busy for all
    for _ in range(2):
        times["learned"].append(draw(diffusion, SVDD(m), learned, 1, first)["seconds"])
        times["chain"].append(draw(diffusion, BestOfN(8), mean, 1, first)["seconds"] / 8)
        times["mean"].append(draw(diffusion, SVDD(m), mean, 1, first[:AT_ONCE])["seconds"])
    best = {name: min(seconds) for name, seconds in times.items()}
    n = max(1, round(best["learned"] / best["chain"]))

    runs = {
        "Unguided": draw(diffusion, Unguided(), mean, images),
        f"BestOfN, N = {n} (equal wall time)": draw(diffusion, BestOfN(n), mean, images),
        f"SVDD, M = {m}, LatentConvValue": draw(diffusion, SVDD(m), learned, images),
    }
    plain, matched, guided = runs.values()
    lines = [
        "# Learned value and posterior mean",
        "",
        f"Compressibility on the embedded model, T = {STEPS}, guidance scale 3, eta 1, {len(PROMPTS)} prompts that the "
        f"value was not trained on. Made by `python -m benchmarks.values`.",
        "",
        "## Correlation with the final reward, by step",
        "",
        f"{4 * len(PROMPTS)} fresh chains, 4 per prompt. `within` is the rank correlation of deviations from the "
        "prompt's mean: what a sampler can choose by.",
        "",
        "| step | learned | posterior mean | learned, within | posterior mean, within | learned, explained variance "
        "| posterior mean, explained variance |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for a, b in zip(tables["LatentConvValue"], tables["PosteriorMean"], strict=True):
        keys = ("spearman", "spearman_within", "explained_variance")
        cells = [f"{table[key]:.3f}" for key in keys for table in (a, b)]
        lines.append(f"| {a['step']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Reward at equal wall time",
        "",
        f"{len(PROMPTS)} prompts x {images} images, paired by prompt, 95 % intervals.",
        "",
        "| sampler | Compressibility | - unguided | CLIPScore - unguided (held out) | denoiser rows | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        differences = ["", ""] if run is plain else [interval(run[key], plain[key]) for key in ("guide", "clip")]
        lines.append(
            f"| {name} | {float(run['guide'].mean()):.3f} | {' | '.join(differences)} | {run['rows']:.0f} "
            f"| {run['seconds']:.2f} |"
        )
    lines += [
        "",
        f"SVDD with the learned value - best of {n}: {interval(guided['guide'], matched['guide'])} kB.",
        "",
        "## Wall time",
        "",
        f"SVDD, M = {m}, learned value / SVDD, M = {m}, posterior mean: {best['learned'] / best['mean']:.3f} "
        f"({len(first)} images, the better of two alternating runs each). Denoiser rows: {STEPS} / "
        f"{SVDD(m).rows(STEPS)}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
