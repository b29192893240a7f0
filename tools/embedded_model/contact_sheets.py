"""Samples the model card's contact sheets of 40 prompts, two per model: training objects, and unseen combinations."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.latent import LatentDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tools.embedded_model.vocabulary import COLORS, OBJECTS

__all__ = ["new_prompts", "seen_prompts", "sheet"]

_ZOOM, _COLUMNS, _LINE = 2, 8, 30


def seen_prompts() -> list[str]:
    """Returns 40 bare object names, spread over the vocabulary."""
    names = list(OBJECTS)
    return [names[k * len(names) // 40] for k in range(40)]


def new_prompts() -> list[str]:
    """Returns 40 random combinations of a colour, an object and a background of two words or more."""
    rng = np.random.default_rng(2026)
    names, colors = list(OBJECTS), list(COLORS)
    prompts = []
    for k in range(40):
        name = names[rng.integers(len(names))]
        ground = colors[rng.integers(len(colors))]
        article = "an" if ground == "orange" else "a"
        tint = f"{colors[rng.integers(len(colors))]} " if k % 2 else ""
        prompts.append(f"{tint}{name} on {article} {ground} background")
    return prompts


@torch.no_grad()
def sheet(diffusion: LatentDiffusion, prompts: list[str], seed: int) -> Image.Image:
    """Returns unguided samples, one per prompt, each under its prompt.

    Args:
        diffusion: The model.
        prompts: One per picture.
        seed: Seed of the first image; the others follow.
    """
    final = Unguided()(Start(diffusion, prompts, range(seed, seed + len(prompts))), PosteriorMean())
    pixels = (final.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    side, font = pixels.shape[1] * _ZOOM, ImageFont.load_default(11)
    rows = -(-len(prompts) // _COLUMNS)
    canvas = Image.new("RGB", (_COLUMNS * (side + 8), rows * (side + _LINE + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (array, prompt) in enumerate(zip(pixels, prompts, strict=True)):
        x, y = k % _COLUMNS * (side + 8) + 4, k // _COLUMNS * (side + _LINE + 4)
        pen.text((x, y), _wrap(prompt), (0, 0, 0), font)
        tile = Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(tile, (x, y + _LINE))
    return canvas


def _wrap(prompt: str) -> str:
    head, _, tail = prompt.partition(" on ")
    return f"{head}\non {tail}" if tail else head


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained", nargs="+", default=["emoji", "emoji-flow"])
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.pretrained:
        steps = {"num_inference_steps": 25, "eta": 0.0} if name == "emoji-flow" else {"num_inference_steps": 50}
        model = AutoDiffusion(name, guidance_scale=3.0, **steps)
        sheet(model, seen_prompts(), 100).save(arguments.folder / f"{name}-seen.png")
        sheet(model, new_prompts(), 200).save(arguments.folder / f"{name}-new.png")
