"""How much of SVDD's compute its reward needs: previews, screening, schedules and precision on the embedded model.

Draws 24 prompts with every recipe, guided by the JPEG size and by CLIPScore, M = 20, T = 50; on a CPU one image at a
time in the reproducible mode, on a GPU as many at once as `--at-once` says. Every finished image is a file, so a run
can be killed and continued, and recipes added. Recipes alternate, so that background load affects all alike.
`--timing` draws once more, for the CPU seconds alone. `benchmarks/data/compute.jsonl` holds the finished cells;
`--only-report` makes benchmarks/compute.md from it.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import Cells
from benchmarks.flops import SHAPES, flops
from benchmarks.paired import PROMPTS, interval
from benchmarks.workers import add_arguments, spread
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.svdd import SVDD
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened

STEPS, CANDIDATES, IMAGES = 50, 20, 2
TIMING = "timing"
BASELINE, FAST = "exact", "features + reuse + tiny > 3, M = 3, 12, 20"  # the second is configs/fast.yaml
GUIDES: dict[str, Callable[[], Reward]] = {"Compressibility": Compressibility, "CLIPScore": CLIPScore}
SAME_DEPTH = {1: 1, 2: 3}  # feature_depth here, and on SD 1.5 and SDXL: outermost layers, outer resolution
ABOUT = (
    f"SVDD at alpha 0 on the embedded model, M = {CANDIDATES}, T = {STEPS}, guidance scale 3, eta 1, {len(PROMPTS)} "
    "prompts, 2 to 6 images of each, same seeds; `images` says how many in all. Differences to the exact posterior "
    "mean are paired by prompt, with 95 % intervals (Student's t); other rewards than the guide are held out "
    "(`CLIPScore-judge`: a second CLIP, trained separately). Network rows are equivalents of rows without guidance; "
    "`decoded` and `tiny` are images of the full and the small decoder, `scored` those that the reward has seen. CPU "
    "seconds are those of one thread relative to exact, from a separate run in which recipes alternate, on the "
    "prompts of `--timing`. SD 1.5 (512 px) "
    "and SDXL (1024 px): counted floating-point operations relative to exact, if the same counts of rows and images "
    "went through those models ([flops.md](flops.md)); features then leave out all but the outer resolution, and "
    "CLIPScore reads ViT-L/14.",
    "",
    "Recipes: `exact` computes as diffusers does, in float32 and with `parity`, and all others network and decoders "
    "in bfloat16; `bf16` does nothing else. `tiny` scores previews of the small decoder; `no CFG` omits the "
    "unconditional half; `reuse` takes the effect of guidance from the parent; `features` recompute the outer "
    "resolution only (`depth 1`: the first and the last layers only); `A > 3`: A screens, the exact value decides "
    "among the best 3. `exact M = 6, then`: up to 0.4 of the chain; `M = 6, 20`: up to 0.4, and after it; `M = 3, 12, "
    "20`: up to 0.2, up to 0.5, and after it; `fitted`: the M of each step that `svdd calibrate` chose from 24 "
    "chains, 16 on average, when it ignored errors of its estimates (it does now, and chooses 16 in every step, from "
    "96 chains too); `RBF`: rollover budget forcing.",
    "",
    "Recipes without the small decoder, except `RBF`, and a part of `exact` were drawn on an H100, the others on "
    "CPUs. Made by "
    "`python -m benchmarks.compute`, which continues where cells are missing.",
)
DATA = Path(__file__).parent / "data" / "compute.jsonl"


@dataclass(frozen=True)
class Recipe:
    """A value, a sampler and a precision.

    `guide` is the name of the reward, on which fitted schedules depend.
    """

    value: Callable[[str], Value] = lambda guide: PosteriorMean()
    sampler: Callable[[str], Sampler] = lambda guide: SVDD(CANDIDATES)
    dtype: str = "bfloat16"
    parity: bool = False


def _tiny(**settings: Any) -> Callable[[str], Value]:
    return lambda guide: PosteriorMean("tiny", **settings)


def _screened(keep: int, start: float = 0.0, **settings: Any) -> Callable[[str], Value]:
    return lambda guide: Screened(PosteriorMean("tiny", **settings), PosteriorMean(), keep, start)


# M of each step: `svdd calibrate`, 16 on average, from 24 chains and without regard to the errors of its estimates.
FITTED: dict[str, list[int]] = json.loads((DATA.parent / "schedules.json").read_text())
_PARENT: dict[str, Any] = {"feature_depth": 2, "reuse_guidance": True}
RECIPES: dict[str, Recipe] = {
    BASELINE: Recipe(dtype="float32", parity=True),
    "bf16": Recipe(),
    "tiny": Recipe(_tiny()),
    "no CFG + tiny": Recipe(_tiny(guidance_scale=1.0)),
    "reuse": Recipe(lambda guide: PosteriorMean(reuse_guidance=True)),
    "reuse + tiny": Recipe(_tiny(reuse_guidance=True)),
    "features": Recipe(lambda guide: PosteriorMean(feature_depth=2)),
    "features, depth 1": Recipe(lambda guide: PosteriorMean(feature_depth=1)),
    "features + reuse": Recipe(lambda guide: PosteriorMean(**_PARENT)),
    "features + reuse + tiny": Recipe(_tiny(**_PARENT)),
    "tiny > 3": Recipe(_screened(3)),
    "features + reuse + tiny > 3": Recipe(_screened(3, **_PARENT)),
    FAST: Recipe(_screened(3, **_PARENT), lambda guide: SVDD({0.2: 3, 0.5: 12, 1.0: 20})),
    "exact M = 6, then features + reuse + tiny > 3": Recipe(
        _screened(3, 0.4, **_PARENT), lambda guide: SVDD({0.4: 6, 1.0: 20})
    ),
    "features + reuse + tiny > 3, M = 6, 20": Recipe(_screened(3, **_PARENT), lambda guide: SVDD({0.4: 6, 1.0: 20})),
    "features + reuse + tiny > 3, fitted to 24 chains": Recipe(
        _screened(3, **_PARENT), lambda guide: SVDD(FITTED[guide])
    ),
    "RBF": Recipe(sampler=lambda guide: RolloverBudget(CANDIDATES)),
    "4 beams": Recipe(sampler=lambda guide: BeamSearch(4, CANDIDATES // 4)),
}


class Counted(StableDiffusion):
    """The embedded model, which counts the rows of each kind of call."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("emoji", STEPS, guidance_scale=3.0, eta=1.0, **settings)
        self.rows: Counter[str] = Counter()

    def denoise(self, x: Tensor, *arguments: Any, **settings: Any) -> Any:
        """Counts rows with guidance."""
        self.rows["full"] += len(x)
        return super().denoise(x, *arguments, **settings)

    def record(self, x: Tensor, *arguments: Any, **settings: Any) -> Any:
        """Counts rows with guidance whose children reuse them."""
        self.rows["full"] += len(x)
        return super().record(x, *arguments, **settings)

    def preview(self, x: Tensor, *arguments: Any, **settings: Any) -> Any:
        """Counts rows of a preview."""
        self.rows["preview"] += len(x)
        return super().preview(x, *arguments, **settings)

    def decode(self, x0: Tensor) -> Tensor:
        """Counts images of the full decoder."""
        self.rows["decoded"] += len(x0)
        return super().decode(x0)


@cache
def build(name: str, guide: str, device: str) -> GuidedDiffusion:
    """Returns the model that draws with a recipe."""
    recipe = RECIPES[name]
    diffusion = Counted(reproducible=device == "cpu", dtype=recipe.dtype, parity=recipe.parity)
    return GuidedDiffusion(GUIDES[guide](), diffusion, recipe.sampler(guide), recipe.value(guide)).eval().to(device)


@cache
def scorers(device: str) -> list[Reward]:
    """Returns the guides and the held-out reward."""
    return [CLIPScore().to(device), CLIPScore("emoji-judge").to(device), Compressibility()]


@dataclass(frozen=True)
class Job:
    """Images that are drawn in one batch: their prompts' numbers, and their own among those of the prompt."""

    kind: str
    guide: str
    recipe: str
    places: tuple[tuple[int, int], ...]

    def keys(self) -> list[dict[str, str | int]]:
        """Returns the key of each image's cell."""
        start = {"kind": self.kind, "guide": self.guide, "recipe": self.recipe}
        return [start | {"prompt": prompt, "image": image} for prompt, image in self.places]


@torch.no_grad()
def draw(job: Job, device: str) -> list[dict[str, Any]]:
    """Returns, for each image, scores by all rewards, counts (means over the batch) and, on a CPU, CPU seconds."""
    model = build(job.recipe, job.guide, device)
    texts = [PROMPTS[prompt] for prompt, _ in job.places]
    model.diffusion.rows.clear()
    began = time.process_time()
    final = model.draw(texts, [1000 * prompt + image for prompt, image in job.places])
    seconds, images = (time.process_time() - began) / len(texts), final.images.float()
    ledger, rows = asdict(final.context.ledger), model.diffusion.rows
    totals = {name: ledger[name] for name in ("denoiser_rows", "network_rows", "reward_calls")} | rows
    totals["tiny"] = ledger["decoded_images"] - rows["decoded"]
    shared: dict[str, Any] = {"counts": {name: round(total / len(texts), 3) for name, total in totals.items()}}
    if job.kind == TIMING:
        shared["seconds"] = round(seconds, 3)
    scores = {reward.name: reward.score(images, texts).tolist() for reward in scorers(device)}
    return [shared | {"scores": {name: round(each[k], 6) for name, each in scores.items()}} for k in range(len(texts))]


def main() -> None:
    """Measures the missing cells and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--prompts", type=int, nargs=2, default=[0, len(PROMPTS)], help="first prompt, and the end")
    parser.add_argument("--images", type=int, nargs=2, default=[0, IMAGES], help="first image of a prompt, and the end")
    parser.add_argument("--at-once", type=int, default=1, help="images in a batch; many on a GPU")
    parser.add_argument("--timing", action="store_true", help="keep CPU seconds too, apart from the other cells")
    parser.add_argument("--only-report", action="store_true", help="write the page from benchmarks/data")
    parser.add_argument("--kept", type=Path, default=Path("build/compute"), help="folder of finished cells")
    add_arguments(parser)
    options = parser.parse_args()
    cells = Cells(DATA, options.kept)
    if not options.only_report:
        for job, found in spread(draw, missing(cells, options), options):
            for key, cell in zip(job.keys(), found, strict=True):
                cells.add(key, cell)
            mean = sum(cell["scores"][job.guide] for cell in found) / len(found)
            print(job.guide, job.recipe, len(found), f"{mean:.3f}, {found[0].get('seconds', 0):.1f} s", flush=True)
    cells.commit()
    text = report(cells)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


def missing(cells: Cells, options: argparse.Namespace) -> list[Job]:
    """Returns the images that are not drawn yet, in batches of one recipe; recipes alternate."""
    kind, jobs = TIMING if options.timing else "scores", []
    places = [(prompt, image) for image in range(*options.images) for prompt in range(*options.prompts)]
    for start in range(0, len(places), options.at_once):
        for guide, name in product(options.rewards, options.recipes):
            whole = Job(kind, guide, name, tuple(places[start : start + options.at_once]))
            new = [place for place, key in zip(whole.places, whole.keys(), strict=True) if key not in cells]
            if new:
                jobs.append(replace(whole, places=tuple(new)))
    return jobs


def report(cells: Cells) -> str:
    """Returns the page."""
    lines = ["# Reward against compute", "", *ABOUT]
    for guide in GUIDES:
        timed = {name: _cells(cells, TIMING, guide, name) for name in RECIPES}
        kept = {name: _cells(cells, "scores", guide, name) for name in RECIPES}
        kept = {name: found for name, found in kept.items() if found}
        if BASELINE not in kept:
            continue
        held_out = [name for name in ("CLIPScore", "CLIPScore-judge", "Compressibility") if name != guide]
        heads = ["recipe", "images", guide, "- exact", *(f"{name} - exact" for name in held_out)]
        heads += ["network rows", "decoded", "tiny", "scored", "CPU seconds", "SD 1.5", "SDXL"]
        lines += ["", f"## Guide {guide}", "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        exact, exact_work = kept[BASELINE], _work(kept[BASELINE], BASELINE, guide)
        for name, found in kept.items():
            own = sum(cell["scores"][guide] for cell in found.values()) / len(found)
            entry = [name, str(len(found)), f"{own:.3f}", *(_minus(found, exact, each) for each in (guide, *held_out))]
            work = _work(found, name, guide)
            entry += [f"{work[kind]:.0f}" for kind in ("network_rows", "decoded", "tiny", "reward_calls")]
            entry.append(_ratio(timed[name], timed[BASELINE]))
            entry += [f"{work[shape] / exact_work[shape]:.2f}" for shape in SHAPES]
            lines.append(f"| {' | '.join(entry)} |")
    return "\n".join(lines) + "\n"


def _cells(cells: Cells, kind: str, guide: str, recipe: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Returns the cells of a recipe by prompt and image."""
    found = cells.select(kind=kind, guide=guide, recipe=recipe)
    return {(cell["key"]["prompt"], cell["key"]["image"]): cell for cell in found}


def _minus(found: dict[Any, Any], exact: dict[Any, Any], reward: str) -> str:
    """Returns the difference to exact with its 95 % interval, paired by prompt over the images that both have."""
    if found is exact:
        return ""
    differences: dict[int, list[float]] = {}
    for place in sorted(found.keys() & exact.keys()):
        difference = found[place]["scores"][reward] - exact[place]["scores"][reward]
        differences.setdefault(place[0], []).append(difference)
    means = torch.tensor([[sum(each) / len(each)] for each in differences.values()])
    return interval(means, torch.zeros_like(means)) if len(means) > 1 else ""


def _ratio(found: dict[Any, Any], exact: dict[Any, Any]) -> str:
    """Returns the CPU seconds of a recipe divided by those of exact, over the images that both have."""
    both = found.keys() & exact.keys()
    if not both:
        return ""
    return f"{sum(found[place]['seconds'] for place in both) / sum(exact[place]['seconds'] for place in both):.2f}"


def _work(found: dict[Any, Any], name: str, guide: str) -> dict[str, float]:
    """Returns the mean counts of a recipe's images, and the operations that they would take on larger models."""
    totals: Counter[str] = Counter()
    for cell in found.values():
        totals.update(cell["counts"])
    work: dict[str, float] = {kind: total / len(found) for kind, total in totals.items()}
    preview = RECIPES[name].value(guide).preview
    for shape in SHAPES:
        counted = flops(shape)
        halves = 2 if preview is None or (preview.guidance_scale is None and not preview.reuse_guidance) else 1
        depth = None if preview is None else preview.feature_depth
        share = 1.0 if depth is None else counted["share"][SAME_DEPTH[depth]]
        work[shape] = (
            (2 * work["full"] + halves * share * work.get("preview", 0)) * counted["network_row"]
            + work["decoded"] * counted["decode"]
            + work["tiny"] * counted["tiny_decode"]
            + work["reward_calls"] * (counted["reward_clip"] if guide == "CLIPScore" else 0)
        )
    return work


if __name__ == "__main__":
    main()
