"""Whether pictures, rows and traces depend on batches, chunks, devices and interruptions, and what the mode costs.

`python -m benchmarks.reproducible` writes benchmarks/reproducible.md: it draws the same images by several commands in
both modes, compares them byte for byte, and measures the CPU seconds of both modes in one interleaved run.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

PAGE = Path(__file__).with_suffix(".md")


class Case(NamedTuple):
    """How a run is drawn; with `then` it is killed once a third is drawn, and continued so."""

    batch: int
    chunk: int | str
    devices: int = 1
    then: "Case | None" = None

    def __str__(self) -> str:
        own = f"batch {self.batch}, chunks {self.chunk}, {self.devices} device{'s' if self.devices > 1 else ''}"
        return own if self.then is None else f"{own}; SIGKILL; then {self.then}"


class Drawn(NamedTuple):
    """What a run holds of an image."""

    picture: str  # SHA-256 of the PNG file
    pixels: np.ndarray  # 0 .. 255
    row: dict[str, Any]  # without seconds
    trace: dict[str, Any]


ON = [
    Case(8, "auto"),
    Case(1, 5),
    Case(8, 7),
    Case(1, "auto", 2),
    Case(3, 7, 2),
    Case(3, "auto", then=Case(8, 5, 2)),
]
OFF = [Case(8, "auto"), Case(3, "auto"), Case(8, 7)]


def draw(case: Case, folder: Path, reward: str, mode: str, options: argparse.Namespace) -> dict[tuple[int, int], Drawn]:
    """Draws a run by its command and returns what it holds of each image."""
    prompts, guide = folder.parent / "prompts.txt", {"Compressibility": "CLIPScore", "CLIPScore": "Compressibility"}
    command = [sys.executable, "-m", "svdd", "predict", "--output", str(folder), "--data.prompts", str(prompts)]
    command += ["--model.reward", reward, f"--model.eval_rewards+={guide[reward]}", "--model.images_per_prompt", "1"]
    command += ["--model.sampler.num_candidates", "8", "--model.diffusion.num_inference_steps", str(options.steps)]
    command += ["--model.diffusion.guidance_scale", "4", "--model.diffusion.reproducible", mode]
    command += ["--trainer.accelerator", "cpu"]
    while True:
        words = ["--data.batch_size", str(case.batch), "--model.diffusion.chunk_size", str(case.chunk)]
        words += ["--trainer.devices", str(case.devices)]
        run = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, start_new_session=True)
        while case.then is not None and run.poll() is None and rows_in(folder) < options.images // 3:
            time.sleep(0.2)
        if case.then is None:
            if run.wait():
                raise SystemExit(f"{mode}, {case}: exit code {run.returncode}")
            return content(folder)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        case = case.then


def rows_in(folder: Path) -> int:
    """Returns the number of rows in the shards of a run under way."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("results*.jsonl"))


def content(folder: Path) -> dict[tuple[int, int], Drawn]:
    """Returns the SHA-256 of each image's PNG file, its row without seconds, and its trace."""
    found: dict[tuple[int, int], Drawn] = {}
    for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        row["ledger"] = {name: number for name, number in row["ledger"].items() if not name.endswith("seconds")}
        file = folder / row["file"]
        picture, pixels = hashlib.sha256(file.read_bytes()).hexdigest(), np.asarray(Image.open(file), dtype=int)
        found[row["prompt_index"], row["image_index"]] = Drawn(picture, pixels, row, {})
    for trace in map(json.loads, (folder / "trace.jsonl").read_text().splitlines()):
        found[trace["prompt_index"], trace["image_index"]].trace.update(trace)
    return found


def compare(options: argparse.Namespace) -> Iterator[str]:
    """Yields the lines of the table of equality."""
    from svdd.assets.hub import ASSETS

    yield "| guide | mode | drawn with | PNG files that differ | by more than 8 of 255 |"
    yield "|---|---|---|---:|---:|"
    for reward in options.guides:
        for mode, cases in (("on", ON), ("off", OFF)):
            with tempfile.TemporaryDirectory() as scratch:
                texts = (ASSETS / "emoji_prompts.txt").read_text().split("\n")[: options.images]
                (Path(scratch) / "prompts.txt").write_text("\n".join(texts))
                setting, expected = {"on": "auto", "off": "false"}[mode], None
                for number, case in enumerate(cases):
                    found = draw(case, Path(scratch) / str(number), reward, setting, options)
                    expected = expected or found
                    if found.keys() != expected.keys() or len(found) != options.images:
                        raise SystemExit(f"{case}: {len(found)} of {options.images} images were drawn")
                    pairs = [(found[key], expected[key]) for key in found]
                    other = sum(one.picture != two.picture for one, two in pairs)
                    far = sum(int(abs(one.pixels - two.pixels).max()) > 8 for one, two in pairs)
                    same = all(one.row == two.row and one.trace == two.trace for one, two in pairs)
                    if mode == "on" and (other or not same):
                        raise SystemExit(f"{case}: pictures, rows or traces differ in the reproducible mode")
                    compared = f"{other} | {far}" if number else "(the others are compared with this run) |"
                    yield f"| {reward} | {mode} | {case} | {compared} |"


def cost() -> Iterator[str]:
    """Yields the lines of the table of costs: the median of ratios of CPU seconds, on one thread."""
    from svdd import GuidedDiffusion, StableDiffusion
    from svdd.rewards.jpeg import Compressibility
    from svdd.samplers import SMC, SVDD, BestOfN, Unguided

    torch.set_num_threads(1)
    yield "| sampler | images in a batch | CPU seconds, off | on / off | `auto` |"
    yield "|---|---:|---:|---:|---|"
    cases: list[tuple[str, Any, tuple[int, ...]]] = [
        ("SVDD, M = 8", lambda: SVDD(8), (1, 4)),
        ("SVDD, M = 20", lambda: SVDD(20), (1, 4)),
        ("SMC, N = 8", lambda: SMC(8), (4,)),
        ("BestOfN, N = 8", lambda: BestOfN(8), (4,)),
        ("SVDD, M = 4", lambda: SVDD(4), (4,)),
        ("Unguided", Unguided, (1, 4, 8)),
    ]
    for name, sampler, batches in cases:
        models = [
            GuidedDiffusion(Compressibility(), StableDiffusion("emoji", 5, 4.0, reproducible=mode), sampler())
            for mode in (False, True, "auto")
        ]
        models[2].on_predict_start()
        for batch in batches:
            seconds: list[list[float]] = [[], []]
            for _ in range(3):
                for model, spent in zip(models, seconds, strict=False):
                    before = time.process_time()
                    model.sample(["apple"] * batch)
                    spent.append(time.process_time() - before)
            ratio = statistics.median(on / off for off, on in zip(*(spent[1:] for spent in seconds), strict=True))
            resolved = "off" if models[2].diffusion.chunker.most is None else "on"
            yield f"| {name} | {batch} | {statistics.median(seconds[0][1:]):.2f} | {ratio:.2f} | {resolved} |"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="Images of each run, one per prompt.")
    parser.add_argument("--steps", type=int, default=25, help="T, the number of denoising steps.")
    parser.add_argument("--guides", nargs="+", default=["Compressibility", "CLIPScore"], help="Guide rewards.")
    options = parser.parse_args()
    lines = [
        "# The reproducible mode",
        "",
        f"The embedded model, {options.images} prompts, SVDD with M = 8 and T = {options.steps}; PNG files, rows "
        "(without seconds) and traces of whole runs. In the mode, rows and traces are equal too. OMP_NUM_THREADS is "
        f"{os.environ.get('OMP_NUM_THREADS', 'not set')}. Made by `python -m benchmarks.reproducible`.",
        "",
    ]
    for part in (
        cost(),
        ["", "CPU seconds of T = 5 steps, one thread, both modes in turn; the second and third of three rounds.", ""],
    ):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    for line in compare(options):
        print(line, flush=True)
        lines.append(line)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
