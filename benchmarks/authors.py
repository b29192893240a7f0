"""SVDD here against the authors' own code: CPU time and reward with the same weights, prompts, M and T.

Give a checkout of github.com/masa-ue/SVDD-image (the version with `Decoding_nonbatch_SDPipeline`, such as 86cc585);
nothing of it is part of this package, and none of its files is changed. `load` states what today's diffusers and the
embedded model need. Recipes alternate on each batch of prompts, on one thread; every finished image is a file, so a run
can be killed and continued. `--only-report` makes benchmarks/authors.md from benchmarks/data/authors.jsonl.
"""

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import diffusers.utils
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from benchmarks.cells import Cells
from benchmarks.compute import CANDIDATES, FAST, RECIPES, STEPS
from benchmarks.paired import PROMPTS, interval
from svdd.assets.hub import ASSETS
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility

SCALE = 3.0
AUTHORS = "authors' code"
OURS = {  # names of benchmarks/compute.py
    "exact, float32": "exact",
    "exact, bfloat16": "bf16",
    "screened, M = 20": "features + reuse + tiny > 3",
    "configs/fast.yaml": FAST,
}
ABOUT = (
    f"SVDD at alpha 0, guided by the JPEG size, on the embedded model: M = {CANDIDATES}, T = {STEPS}, guidance scale "
    f"{SCALE:g}, eta 1. The authors' code is `Decoding_nonbatch_SDPipeline` of github.com/masa-ue/SVDD-image, commit "
    "86cc585, which evaluates a batch of prompts once per candidate. CPU seconds are those of one thread for an image, "
    "four prompts at once (the authors' default is two), loading left out; they are kept where the recipes alternated, "
    "on 8 of the 16 prompts. All start from "
    "the same latents and draw other noise after it. The same scorers score the finished images; differences are "
    "paired by prompt, with 95 % intervals (Student's t); the reward is minus the JPEG size in kB.",
    "",
    "The recipes are those of [compute.md](compute.md); the last two have `chunk_size: 40` and `reproducible: false`, "
    "as configs/fast.yaml has. Made by `python -m benchmarks.authors --code FOLDER`, which says what the authors' code "
    "needs today.",
)
DATA = Path(__file__).parent / "data" / "authors.jsonl"


def load(folder: Path) -> Any:
    """Returns the authors' non-batched pipeline on the embedded model, ready to draw.

    Their files stay as they are. Around them:

    - `diffusers.utils.randn_tensor` has moved, and is put back; `sklearn`, which they import for the metrics of a
      classifier that is not used here, is replaced if it is not installed.
    - The embedded model predicts v; their steps take epsilon alone. The network's output is converted, which changes
      neither the samples nor, by more than 0.1 %, the time.
    """
    diffusers.utils.randn_tensor = randn_tensor  # type: ignore[attr-defined]
    if importlib.util.find_spec("sklearn") is None:
        sys.modules["sklearn"], metrics = ModuleType("sklearn"), ModuleType("sklearn.metrics")
        metrics.precision_recall_fscore_support = None  # type: ignore[attr-defined]
        sys.modules["sklearn.metrics"] = metrics
    sys.path.insert(0, str(folder.resolve()))
    code = importlib.import_module("sd_pipeline").Decoding_nonbatch_SDPipeline
    scorer = importlib.import_module("compressibility_scorer").CompressibilityScorer_modified
    pipe: Any = code.from_pretrained(str(ASSETS / "emoji-sd"), safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    pipe.unet.forward = _Epsilon(pipe.unet, pipe.scheduler.alphas_cumprod)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    pipe.setup_scorer(scorer(dtype=torch.float32))
    pipe.set_variant("PM")
    pipe.set_reward("compressibility")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Epsilon:
    """A UNet's forward that returns epsilon = sqrt(a) v + sqrt(1 - a) x, where the UNet predicts v."""

    def __init__(self, network: Any, alphas: Tensor) -> None:
        self.forward, self.alphas = network.forward, alphas

    def __call__(self, x: Tensor, t: Tensor, **arguments: Any) -> Any:
        alpha = self.alphas[t]
        return SimpleNamespace(sample=alpha.sqrt() * self.forward(x, t, **arguments).sample + (1 - alpha).sqrt() * x)


@cache
def build(name: str, code: Path | None) -> Any:
    """Returns what draws with a recipe."""
    if name == AUTHORS:
        if code is None or not (code / "sd_pipeline.py").is_file():
            raise SystemExit(f"--code: expected a checkout of github.com/masa-ue/SVDD-image, got {code}")
        return load(code)
    recipe = RECIPES[OURS[name]]
    settings = {} if name.startswith("exact") else {"chunk_size": 40, "reproducible": False}  # of configs/fast.yaml
    settings |= {"dtype": recipe.dtype, "parity": recipe.parity}
    diffusion = StableDiffusion("emoji", STEPS, guidance_scale=SCALE, eta=1.0, **settings)
    reward = Compressibility()
    return GuidedDiffusion(reward, diffusion, recipe.sampler(reward.name), recipe.value(reward.name)).eval()


@cache
def starts() -> tuple[int, ...]:
    """Returns the shape of an image's latents."""
    return tuple(StableDiffusion("emoji", 2).latent_shape)


@torch.no_grad()
def draw(model: Any, texts: list[str], seeds: list[int]) -> tuple[float, Tensor]:
    """Returns the CPU seconds of drawing these images, and the images; equal seeds start from equal latents."""
    if isinstance(model, GuidedDiffusion):
        began = time.process_time()
        images = model.draw(texts, seeds).images.float()
        return time.process_time() - began, images
    latents = torch.stack([torch.randn(starts(), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    torch.manual_seed(seeds[0])
    model.set_parameters(len(texts), CANDIDATES)
    began = time.process_time()
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "eta": 1.0, "output_type": "np"}
    images, _ = model(texts, latents=latents, **settings)
    return time.process_time() - began, torch.from_numpy(images).permute(0, 3, 1, 2).float()


def main() -> None:
    """Measures the missing cells and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, help="folder of a checkout of the authors' repository")
    parser.add_argument("--recipes", nargs="+", default=[AUTHORS, *OURS], choices=[AUTHORS, *OURS])
    parser.add_argument("--prompts", type=int, nargs=2, default=[0, 12], help="first prompt, and the end")
    parser.add_argument("--image", type=int, default=0, help="number of the image among those of its prompt")
    parser.add_argument("--batch", type=int, default=4, help="prompts at once; 2 is the authors' default")
    parser.add_argument("--only-report", action="store_true", help="write the page from benchmarks/data")
    parser.add_argument("--kept", type=Path, default=Path("build/authors"), help="folder of finished cells")
    options = parser.parse_args()
    cells = Cells(DATA, options.kept)
    if not options.only_report:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", category=FutureWarning)  # of what the authors' code calls
        measure(cells, options)
    cells.commit()
    text = report(cells)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


def measure(cells: Cells, options: argparse.Namespace) -> None:
    """Draws what is missing, with one recipe after the other on each batch."""
    scorers = (Compressibility(), CLIPScore())
    first, end = options.prompts
    for start in range(first, end, options.batch):
        numbers = range(start, min(start + options.batch, end))
        texts, seeds = [PROMPTS[k] for k in numbers], [1000 * k + options.image for k in numbers]
        for name in options.recipes:
            keys = [{"recipe": name, "prompt": k, "image": options.image} for k in numbers]
            if all(key in cells for key in keys):
                continue
            model = build(name, options.code)
            seconds, images = draw(model, texts, seeds)
            scores = {reward.name: reward.score(images, texts).tolist() for reward in scorers}
            for k, key in enumerate(keys):
                own = {reward: round(each[k], 6) for reward, each in scores.items()}
                cells.add(key, {"seconds": round(seconds / len(texts), 3), "scores": own})
            print(name, *numbers, f"{scores['Compressibility']}", f"{seconds / len(texts):.2f} s an image", flush=True)


def report(cells: Cells) -> str:
    """Returns the page."""
    theirs = _by_place(cells, AUTHORS)
    lines = ["# Against the authors' code", "", *ABOUT, ""]
    heads = ["recipe", "images", "CPU seconds", "relative", "JPEG", "- authors", "CLIPScore", "- authors"]
    lines += [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in (AUTHORS, *OURS):
        own = _by_place(cells, name)
        places = sorted(own.keys() & theirs.keys())
        if not places:
            continue
        timed = [place for place in places if "seconds" in own[place] and "seconds" in theirs[place]]
        seconds, others = (sum(each[place]["seconds"] for place in timed) for each in (own, theirs))
        entry = [
            name,
            str(len(places)),
            *((f"{seconds / len(timed):.1f}", f"{seconds / others:.2f}") if timed else ("", "")),
        ]
        for reward in ("Compressibility", "CLIPScore"):
            entry.append(f"{sum(own[place]['scores'][reward] for place in places) / len(places):.3f}")
            entry.append("" if name == AUTHORS else _minus(own, theirs, places, reward))
        lines.append(f"| {' | '.join(entry)} |")
    return "\n".join(lines) + "\n"


def _by_place(cells: Cells, recipe: str) -> dict[tuple[int, int], dict[str, Any]]:
    return {(cell["key"]["prompt"], cell["key"]["image"]): cell for cell in cells.select(recipe=recipe)}


def _minus(own: dict[Any, Any], theirs: dict[Any, Any], places: list[tuple[int, int]], reward: str) -> str:
    """Returns the difference to the authors' code with its 95 % interval, paired by prompt."""
    differences: dict[int, list[float]] = {}
    for place in places:
        difference = own[place]["scores"][reward] - theirs[place]["scores"][reward]
        differences.setdefault(place[0], []).append(difference)
    means = torch.tensor([[sum(each) / len(each)] for each in differences.values()])
    return interval(means, torch.zeros_like(means)) if len(means) > 1 else ""


if __name__ == "__main__":
    main()
