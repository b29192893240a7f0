"""SVDD guided by TextRendering on a chain that misspells, against unguided sampling and best of N at equal rows.

Held out are the spelling, which is known from the latents, and another reader: detector and recogniser of PP-OCRv4,
from the wheel of rapidocr-onnxruntime (`pip install --no-deps rapidocr-onnxruntime`). Writes benchmarks/guided_text.md
and docs/images/guided_text.png.
"""

import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from benchmarks.misspelling import Misspelling
from benchmarks.paired import interval
from svdd import GuidedDiffusion
from svdd.rewards.text_rendering import TextRendering
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided

WORDS = ("WELCOME", "BIRTHDAY", "KITCHEN", "ORCHARD", "LIBRARY", "MOUNTAIN", "GARDEN", "HARBOUR", "FESTIVAL", "JOURNEY")
STEPS, SEEDS, NUMBER, SIDE = 12, 2, 8, 160  # SEEDS images of each word; N = M = NUMBER
SHOWN = 3  # words of the picture


def held_out() -> TextRendering:
    """Returns the reader that guides no run."""
    folder = Path(find_spec("rapidocr_onnxruntime").origin).parent / "models"  # type: ignore[union-attr, arg-type]
    files = {part: str(folder / f"ch_PP-OCRv4_{part}_infer.onnx") for part in ("det", "rec")}
    return TextRendering(detector=files["det"], recognizer=files["rec"])


def runs() -> dict[str, tuple[TextRendering, Sampler]]:
    """Returns guides and samplers by what the table calls them."""
    guide, soft = TextRendering(side=SIDE), TextRendering(side=SIDE, soft=True)
    return {
        "unguided": (guide, Unguided()),
        f"best of {NUMBER}": (guide, BestOfN(NUMBER)),
        f"best of {NUMBER}, `soft`": (soft, BestOfN(NUMBER)),
        f"SVDD, M = {NUMBER}": (guide, SVDD(NUMBER)),
        f"SVDD, M = {NUMBER}, `soft`": (soft, SVDD(NUMBER)),
    }


def main() -> None:
    """Draws, measures and writes the page and the picture."""
    torch.set_num_threads(1)
    diffusion, judge, reader = Misspelling(STEPS), held_out(), TextRendering(side=SIDE)
    prompts = [f'a sign that says "{word}"' for word in WORDS for _ in range(SEEDS)]
    found: dict[str, list[Tensor]] = {}
    lines = [
        *("# Guided by reading", ""),
        "The chain of [misspelling.py](misspelling.py) writes the quoted word and gets half of its letters wrong. "
        f"{len(WORDS)} words x {SEEDS} images, T = {STEPS}, same seeds; differences to unguided sampling are paired by "
        f"word, with 95 % intervals. The guide is `TextRendering(side={SIDE})`: RapidOCR {version('rapidocr')} with "
        "PP-OCRv6. Held out: the share of right letters in the latents, and PP-OCRv4 of rapidocr-onnxruntime "
        f"{version('rapidocr-onnxruntime')}. Made by `python -m benchmarks.guided_text`.",
        "",
        "| run | rows an image | read by the guide | - unguided | right letters | - unguided | read by PP-OCRv4 "
        "| - unguided | CPU seconds an image |",
        "|---|" + "---:|" * 8,
    ]
    shown = []
    for name, (reward, sampler) in runs().items():
        model, begun = GuidedDiffusion(reward, diffusion, sampler), time.process_time()
        final = model.draw(prompts, range(len(prompts)))
        seconds = (time.process_time() - begun) / len(prompts)
        scores = [reader.score(final.images, prompts), diffusion.spelling(final.x0, prompts)]
        found[name] = [each.view(len(WORDS), SEEDS) for each in (*scores, judge.score(final.images, prompts))]
        shown.append(final.images[: SHOWN * SEEDS : SEEDS])
        rows = final.context.ledger.denoiser_rows / len(prompts)
        cells = [name, f"{rows:.0f}"]
        for own, plain in zip(found[name], found["unguided"], strict=True):
            cells += [f"{float(own.mean()):.3f}", "" if name == "unguided" else interval(own, plain)]
        lines.append(f"| {' | '.join([*cells, f'{seconds:.1f}'])} |")
        print(lines[-1], flush=True)
    best, guided = (found[name] for name in (f"best of {NUMBER}", f"SVDD, M = {NUMBER}"))
    gains = [interval(own, other) for own, other in zip(guided, best, strict=True)]
    lines += [
        "",
        f"SVDD - best of {NUMBER}: {gains[0]} as the guide reads, {gains[1]} in right letters, {gains[2]} as ",
    ]
    lines[-1] += "PP-OCRv4 reads."
    lines += ["", "![Each row a run, in the order of the table](../docs/images/guided_text.png)"]
    lines += ["", "*`python -m benchmarks.guided_text`*"]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    picture = Path(__file__).parents[1] / "docs" / "images" / "guided_text.png"
    save_image(make_grid(torch.cat(shown), nrow=SHOWN, padding=4, pad_value=0.6), picture)


if __name__ == "__main__":
    main()
