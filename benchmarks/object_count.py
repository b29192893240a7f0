"""Guidance by the number of objects: SVDD on a chain that draws shapes, with ObjectCount and a trained detector.

    python -m tools.tiny_detector runs/detector         # a small OWLv2, trained on drawn shapes
    python -m benchmarks.object_count runs/detector

Writes `benchmarks/object_count.md`. The chain has no weights and knows nothing of the prompt: each of 16 cells holds a
disc, a square or nothing, as its latent numbers say, so that the true number of discs is known. The detector was
trained on other pictures, and sees only the image.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paired import interval
from svdd.diffusion.base import Denoised, Diffusion
from svdd.rewards.object_count import ObjectCount
from svdd.samplers import SVDD, BestOfN, Unguided
from svdd.samplers.base import Sampler
from svdd.state import Start, State
from svdd.values import PosteriorMean
from tools.tiny_detector import SIDE

GRID, CELL = 4, SIDE // 4
VISIBLE = 0.8  # presence above which a cell holds a shape
WORDS = ("one disc", "two discs", "three discs", "four discs", "five discs", "six discs")


class Shapes(Diffusion):
    """x_0 ~ N(0, I) and x_i = x_0 + sigma_i noise; a cell's five numbers: presence, kind, place and size."""

    def __init__(self, num_inference_steps: int = 20, chunk_size: int | str = "auto") -> None:
        super().__init__(num_inference_steps, chunk_size)
        self.sigmas = [*torch.logspace(1, -2, num_inference_steps).tolist(), 0.0]
        self.latent_shape = (5, GRID, GRID)
        self.colours = 0.6 * torch.rand(GRID, GRID, 3, generator=torch.Generator().manual_seed(1))

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Tensor:
        """Returns nothing of the prompt."""
        return torch.zeros(len(prompts), 1)

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the spread of x at i = 0."""
        return noise * self._variance(0) ** 0.5

    def denoise(self, x: Tensor, i: int, conditioning: Tensor, row: Tensor) -> Denoised:
        """Returns the exact posterior mean and the exact mean of the next x."""
        now, after = self._variance(i), self._variance(i + 1)
        return Denoised(x0=x / now, mean=x * after / now)

    def std(self, i: int) -> float:
        """The exact standard deviation of x at i + 1, given x at i."""
        now, after = self._variance(i), self._variance(i + 1)
        return (after * (now - after) / now) ** 0.5

    def decode(self, x0: Tensor) -> Tensor:
        """Draws the shapes."""
        presence, kind, across, down, size = (part[..., None, None] for part in x0.unbind(1))  # [n, 4, 4, 1, 1]
        rows, columns = torch.meshgrid(*[torch.arange(CELL) + 0.5 - CELL / 2] * 2, indexing="ij")
        x, y = columns - across.clamp(-1.5, 1.5), rows - down.clamp(-1.5, 1.5)
        reach = torch.where(kind > 0, (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()))
        opacity = (10 * (presence - VISIBLE)).sigmoid()
        inside = (opacity * (5.75 + size.clamp(-1, 1) / 2 - reach).clamp(0, 1))[..., None]  # [n, 4, 4, cell, cell, 1]
        tiles = 0.9 * (1 - inside) + self.colours[:, :, None, None] * inside
        return tiles.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, SIDE, SIDE)

    def _variance(self, i: int) -> float:
        return 1 + self.sigmas[i] ** 2


def true_counts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of discs and of squares, [n] each, that latents say."""
    visible, disc = x[:, 0] > VISIBLE, x[:, 1] > 0
    return (visible & disc).sum((1, 2)).float(), (visible & ~disc).sum((1, 2)).float()


def main(detector: str, images: int) -> None:
    """Draws all runs and writes the table."""
    prompts = [word for word in WORDS for _ in range(images)]
    wanted = torch.tensor([1.0 + k for k in range(len(WORDS)) for _ in range(images)])
    reward = ObjectCount(detector, threshold=0.5, softness=0.1, overlap=0.4, batch_size=64)
    samplers: dict[str, Sampler] = {"unguided": Unguided(), "best of 8": BestOfN(8), "SVDD, M = 8": SVDD(8)}
    lines, errors, scores = [], {}, {}
    for name, sampler in samplers.items():
        value, diffusion, begun = PosteriorMean(), Shapes(), time.process_time()
        value.bind(reward, diffusion)
        final: State = sampler(Start(diffusion, prompts, range(len(prompts))), value)
        scores[name] = reward.score(diffusion.decode(final.x), prompts)
        discs, squares = true_counts(final.x)
        errors[name] = (discs - wanted).abs()
        seconds = (time.process_time() - begun) / len(prompts)
        right = 100 * (errors[name] == 0).float().mean()
        cells = [f"{scores[name].mean():.2f}", f"{errors[name].mean():.2f}", f"{right:.0f} %"]
        lines.append([name, *cells, f"{squares.mean():.2f}", f"{seconds:.2f}"])
    header = ["sampler", "ObjectCount", "true error", "right number", "squares", "CPU s per image"]
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    text = [
        "# Guidance by the number of objects",
        "",
        "SVDD guided by ObjectCount on a chain that draws shapes; `benchmarks/object_count.py` says how to repeat it.",
        "",
    ]
    text += [
        f"{len(WORDS)} prompts (`{WORDS[0]}` to `{WORDS[-1]}`) x {images} images, T = 20, same seeds; the detector"
    ]
    text += [
        "was trained for 1400 steps of 24 pictures. ObjectCount guides. The true error, which it does not see, is the"
    ]
    text += ["distance of the number of discs in the latent from the wanted one. Squares are distractors.", ""]
    text += ["| " + " | ".join(line) + " |" for line in table]
    text += ["", "Difference of the true error, paired by prompt and seed, with its 95 % interval over prompts:", ""]
    for other in ("unguided", "best of 8"):
        text.append(
            f"- SVDD - {other}: {interval(errors['SVDD, M = 8'].view(-1, images), errors[other].view(-1, images))}"
        )
    agreement = torch.corrcoef(torch.stack([torch.cat([*scores.values()]), -torch.cat([*errors.values()])]))[0, 1]
    number = len(prompts) * len(samplers)
    text += [
        "",
        f"Correlation of ObjectCount and minus the true error over all {number} pictures: {agreement:.2f}.",
        "",
    ]
    file = Path(__file__).with_suffix(".md")
    file.write_text("\n".join(text), encoding="utf-8")
    print(file.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    main(options.detector, options.images)
