"""Arithmetic: CPU time and rewards of whole runs in each precision of the Trainer, against float32 bit for bit.

Writes benchmarks/arithmetic.md: SVDD on the embedded model, guided by CLIPScore, one thread. Modes alternate on each
batch of prompts; every finished image is a file, so a run can be killed and continued.
"""

import argparse
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision

from benchmarks.cells import Cells
from benchmarks.paired import PROMPTS, interval
from svdd.diffusion.auto import AutoDiffusion
from svdd.evaluation.rendering import render
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards import CLIPScore, Compressibility, Reward
from svdd.samplers import SVDD

STEPS, CANDIDATES = 20, 8
DATA = Path(__file__).parent / "data" / "arithmetic.jsonl"
EXACT = "32-true, parity"
MODES: dict[str, tuple[str, Precision | None]] = {  # dtype of the weights, and Lightning's plugin
    EXACT: ("float32", None),
    "32-true": ("float32", None),
    "bf16-true": ("bfloat16", HalfPrecision("bf16-true")),
    "bf16-mixed": ("float32", MixedPrecision("bf16-mixed", "cpu")),
    "16-true": ("float16", HalfPrecision("16-true")),
    "16-mixed": ("float32", MixedPrecision("16-mixed", "cpu")),
}
ABOUT = (
    f"SVDD, M = {CANDIDATES}, T = {STEPS}, guidance scale 3, eta 1, on the embedded model, guided by CLIPScore, same "
    "seeds in all modes, one CPU thread. `CLIPScore-judge`, a second CLIP trained separately, and the JPEG size are "
    "held out. Differences are paired by prompt, with 95 % intervals (Student's t); `change` is that of the mean. CPU "
    "seconds are relative to the first row; the modes alternate. Lightning turns `16-mixed` into bfloat16 on a CPU; "
    "here its plugin computes in float16. Made by `python -m benchmarks.arithmetic`."
)


@cache
def build(mode: str) -> GuidedDiffusion:
    """Returns the model that draws in a mode, as a Trainer prepares it."""
    dtype, plugin = MODES[mode]
    options: dict[str, Any] = {"guidance_scale": 3.0, "eta": 1.0, "dtype": dtype, "parity": mode == EXACT}
    model = GuidedDiffusion(CLIPScore(), AutoDiffusion("emoji", STEPS, **options), SVDD(CANDIDATES)).eval()
    model.configure_model()
    if plugin is not None:
        plugin.convert_module(model)
    return model


@cache
def scorers() -> list[Reward]:
    """Returns the guide and the held-out rewards."""
    return [CLIPScore(), CLIPScore("emoji-judge"), Compressibility()]


def measure(mode: str, numbers: list[int]) -> list[dict[str, Any]]:
    """Returns the scores of one image for each of some prompts, and its CPU seconds."""
    model, plugin = build(mode), MODES[mode][1]
    texts = [PROMPTS[number] for number in numbers]
    began = time.process_time()
    with torch.inference_mode(), nullcontext() if plugin is None else plugin.forward_context():
        images = model.draw(texts, [1000 * number for number in numbers]).images.float()
    seconds = (time.process_time() - began) / len(texts)
    scores = {reward.name: reward.score(images, texts).tolist() for reward in scorers()}
    return [
        {"seconds": round(seconds, 3), "scores": {name: round(each[k], 6) for name, each in scores.items()}}
        for k in range(len(texts))
    ]


def main() -> None:
    """Measures the missing cells and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--batch", type=int, default=4, help="prompts at once")
    parser.add_argument("--kept", type=Path, default=Path("build/arithmetic"), help="folder of finished cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(DATA, options.kept)
    for mode in options.modes:  # the first calls of a mode make caches
        measure(mode, [0])
    for start in range(0, options.prompts, options.batch):
        numbers = list(range(start, min(start + options.batch, options.prompts)))
        for mode in options.modes:
            keys: list[dict[str, str | int]] = [{"mode": mode, "prompt": number} for number in numbers]
            if not all(key in cells for key in keys):
                for key, found in zip(keys, measure(mode, numbers), strict=True):
                    cells.add(key, found)
                print(mode, numbers, found["seconds"], "s an image", flush=True)
    cells.commit()
    text = report(cells)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


def report(cells: Cells) -> str:
    """Returns the page."""
    guide, *held_out = [reward.name for reward in scorers()]
    heads = [
        "--trainer.precision",
        "prompts",
        "CPU seconds",
        guide,
        "difference",
        "change",
        *(f"{name}, difference" for name in held_out),
    ]
    exact, rows = {cell["key"]["prompt"]: cell for cell in cells.select(mode=EXACT)}, []
    for mode in MODES:
        pairs = [(cell, exact[cell["key"]["prompt"]]) for cell in cells.select(mode=mode)]
        if not pairs:
            continue
        own, theirs = (
            {name: torch.tensor([[pair[k]["scores"][name]] for pair in pairs]) for name in (guide, *held_out)}
            for k in (0, 1)
        )
        seconds = sum(cell["seconds"] for cell, _ in pairs) / sum(cell["seconds"] for _, cell in pairs)
        change = float(own[guide].mean() / theirs[guide].mean() - 1)
        differences = ["" if mode == EXACT else interval(own[name], theirs[name]) for name in own]
        shown = "" if mode == EXACT else f"{change:+.2%}"
        mean = f"{float(own[guide].mean()):.4f}"
        rows.append([mode, str(len(pairs)), f"{seconds:.2f}", mean, differences[0], shown, *differences[1:]])
    return "\n".join(["# Arithmetic", "", ABOUT, "", render(heads, rows, "md").rstrip(), ""])


if __name__ == "__main__":
    main()
