"""TextRendering on rendered words of which a known share of letters can be read, with the real weights.

Writes benchmarks/text_rendering.md.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from benchmarks.lettering import DAMAGES, as_tensor, draw_word
from svdd.rewards.text_rendering import TextRendering

WORDS = (
    *("WELCOME", "Birthday", "Chocolate", "OPEN", "adventure", "GRAND", "Library", "MOUNTAIN", "Summer", "kitchen"),
    *("Breakfast", "HORIZON", "garden", "Telescope", "JOURNEY", "Harbour", "winter", "FESTIVAL", "Notebook", "bridge"),
    *("Orchestra", "VICTORY", "planet", "Umbrella", "THUNDER", "Gallery", "forest", "DIAMOND", "Sandwich", "rocket"),
    *("Carnival", "PYRAMID", "island", "Passport", "COMPASS", "Lantern", "market", "TREASURE", "Dinosaur", "velvet"),
)
SIZES = (12, 18, 28, 44)
INKS = (((20, 20, 20), (250, 250, 250)), ((240, 240, 240), (30, 60, 120)), ((160, 20, 20), (240, 220, 170)))


def cases() -> list[tuple[str, float, Tensor]]:
    """Returns words, shares of readable letters, and images [1, 3, h, w]."""
    generator, found = np.random.default_rng(0), []
    for k, word in enumerate(WORDS):
        lost = round(len(word) * (k // 4 % 5) / 4 * 0.999)
        damaged = sorted(generator.permutation(len(word))[:lost].tolist())
        ink, paper = INKS[k % len(INKS)]
        picture = draw_word(word, SIZES[k % 4], damaged, DAMAGES[k // 20 * 2 + k % 2], ink=ink, paper=paper)
        found.append((word, 1 - lost / len(word), as_tensor([picture])))
    return found


def settings() -> dict[str, dict[str, Any]]:
    """Returns the measured arguments of TextRendering by what the table calls them."""
    named = {"the defaults": {}, "`soft`": {"soft": True}, "`whole`": {"whole": True}}
    return named | {f"`side` {side}": {"side": side} for side in (160, 640)}


def backgrounds() -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns what is done to the pictures, by name."""
    noise = torch.randn(1, 3, 200, 400, generator=torch.Generator().manual_seed(0))
    return {
        "plain": lambda images: images,
        "noise of std 0.15": lambda images: (images + 0.15 * noise[..., : images.shape[2], : images.shape[3]]).clamp(
            0, 1
        ),
        "half as large": lambda images: F.interpolate(images, scale_factor=0.5, mode="area"),
    }


def main() -> None:
    """Measures and writes the page."""
    torch.set_num_threads(1)
    words, known, images = zip(*cases(), strict=True)
    lines = [
        *("# Reading words of which a known share can be read", ""),
        f"{len(WORDS)} words in PIL's own font, {', '.join(map(str, SIZES))} pixels, in three pairs of colours. Of "
        f"their letters, none to all are {', '.join(DAMAGES[:-1])} or {DAMAGES[-1]}. `TextRendering` with RapidOCR "
        f"{version('rapidocr')} and the weights in its wheel. Made by `python -m benchmarks.text_rendering`.",
        *("", "| pictures | arguments | rank correlation | mean absolute difference | CPU seconds a picture |"),
        "|---|---|---:|---:|---:|",
    ]
    for background, change in backgrounds().items():
        for name, arguments in settings().items():
            reward = TextRendering(**arguments)
            reward.load()
            begun = time.process_time()
            scores = [
                float(reward.score(change(each), [f'"{word}"'])) for word, each in zip(words, images, strict=True)
            ]
            seconds = (time.process_time() - begun) / len(words)
            found, expected = torch.tensor(scores), torch.tensor(known)
            correlation = float(spearman_corrcoef(found, expected))
            difference = float((found - expected).abs().mean())
            lines.append(f"| {background} | {name} | {correlation:.3f} | {difference:.3f} | {seconds:.3f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
