"""All samplers at equal compute on the embedded model: same prompts, same seeds, three budgets, two guide rewards.

Every finished part (a guide, a budget, a sampler, two prompts) is a file, so a run can be killed and continued, and
samplers or prompts added. `benchmarks/data/samplers.jsonl` holds the finished parts, from which `--only-report` makes
benchmarks/samplers.md.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cells
from benchmarks.paired import PROMPTS, interval
from benchmarks.workers import add_arguments, spread
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import fit_budget
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.dps import DPS
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean

STEPS, IMAGES = 25, 2  # images per prompt
BUDGETS, GUIDES = (200, 400, 800), ("Compressibility", "CLIPScore")
PLAIN, BASELINE, ON_THE_ODE = "Unguided", "BestOfN", ", eta 0"
DATA = Path(__file__).parent / "data" / "samplers.jsonl"


@cache
def chain(eta: float, device: str) -> StableDiffusion:
    """Returns the embedded model with as much noise in its steps."""
    return StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=eta).to(device)


@cache
def rewards(device: str) -> dict[str, Reward]:
    """Returns the guides and the held-out reward by name."""
    found = (Compressibility(), CLIPScore(), CLIPScore("emoji-judge"))
    return {reward.name: reward.to(device) for reward in found}


def entries(guide: Reward, budget: int) -> dict[str, Callable[[], Sampler]]:
    """Returns the samplers by their name in the table; a budget sets their counts."""
    if budget == 0:
        return unbudgeted(guide)
    neighbours = 7 if budget == 200 else 5  # with which the last move fits
    table: dict[str, Callable[[], Sampler]] = {
        BASELINE: BestOfN,
        "SVDD": SVDD,
        "BeamSearch, 4 beams": lambda: BeamSearch(num_beams=4),
        "RolloverBudget": RolloverBudget,
        "Refinement": Refinement,
        "BlockwiseBestOfN, blocks of 5": lambda: BlockwiseBestOfN(block_size=5),
        "SMC": SMC,
        "ProgressivePruning": ProgressivePruning,
        "RandomSearch": RandomSearch,
        f"ZeroOrderSearch, {neighbours} neighbours": lambda: ZeroOrderSearch(num_candidates=neighbours),
        f"RandomSearch{ON_THE_ODE}": RandomSearch,
        f"EvolutionarySearch{ON_THE_ODE}": EvolutionarySearch,
        f"CrossEntropySearch{ON_THE_ODE}": CrossEntropySearch,
    }
    if budget == 200:  # a variant, omitted from the more expensive tables
        table["SMC, max, exponential"] = lambda: SMC(potential="max", tempering="exponential")
    if guide.differentiable:
        table["TwistedSMC"] = TwistedSMC
        table[f"NoiseOptimisation{ON_THE_ODE}"] = NoiseOptimisation
    return table


def unbudgeted(guide: Reward) -> dict[str, Callable[[], Sampler]]:
    """Returns the samplers that cost T rows for any budget."""
    table: dict[str, Callable[[], Sampler]] = {PLAIN: Unguided}
    if guide.differentiable:
        table["DPS, scale 100"] = lambda: DPS(scale=100)
        table["DPS, scale 100, not through the denoiser"] = lambda: DPS(scale=100, through_denoiser=False)
    return table


@dataclass(frozen=True)
class Job:
    """Prompts, by their numbers, that one sampler draws in one batch, IMAGES images of each."""

    guide: str
    budget: int
    sampler: str
    prompts: tuple[int, ...]

    def keys(self) -> list[dict[str, str | int]]:
        """Returns the key of each prompt's cell."""
        return [
            {"guide": self.guide, "budget": self.budget, "sampler": self.sampler, "prompt": prompt}
            for prompt in self.prompts
        ]


@torch.no_grad()
def draw(
    diffusion: LatentDiffusion,
    sampler: Sampler,
    guide: Reward,
    scorers: Sequence[Reward],
    prompts: Sequence[int],
    value: Value | None = None,
) -> dict[str, Any]:
    """Draws IMAGES images of each prompt, given by its number; returns scores [prompts][images], diversity, counts."""
    value, clip = value or PosteriorMean(), next(reward for reward in scorers if reward.name == "CLIPScore")
    value.bind(guide, diffusion)
    places = [(prompt, image) for prompt in prompts for image in range(IMAGES)]
    texts = [PROMPTS[prompt] for prompt, _ in places]
    final = sampler(Start(diffusion, texts, [1000 * prompt + image for prompt, image in places]), value)
    images, ledger = final.images, final.context.ledger
    features = clip.image_features(images)  # type: ignore[operator]
    return {
        "scores": {reward.name: reward.score(images, texts).view(-1, IMAGES).tolist() for reward in scorers},
        "diversity": distances(features.view(-1, IMAGES, features.shape[-1])).tolist(),
        "rows": (ledger.denoiser_rows + 2 * ledger.gradient_rows) / len(texts),
        "decoded": ledger.decoded_images / len(texts),
    }


def draw_cells(job: Job, device: str) -> list[dict[str, Any]]:
    """Returns the cell of each prompt of a job."""
    diffusion, guide = chain(0.0 if job.sampler.endswith(ON_THE_ODE) else 1.0, device), rewards(device)[job.guide]
    sampler, value = entries(guide, job.budget)[job.sampler](), PosteriorMean()
    value.bind(guide, diffusion)
    if job.budget:
        sampler = fit_budget(sampler, job.budget, diffusion, value)
    found, cells = draw(diffusion, sampler, guide, list(rewards(device).values()), job.prompts), []
    shared = {kind: round(found[kind], 3) for kind in ("rows", "decoded")}
    for k in range(len(job.prompts)):
        own = {name: [round(score, 6) for score in scores[k]] for name, scores in found["scores"].items()}
        cells.append({"scores": own, "diversity": round(found["diversity"][k], 6), **shared})
    return cells


def distances(features: torch.Tensor) -> torch.Tensor:
    """Returns the mean of 1 - cosine over all pairs in each group; features of unit length, [groups, n, d]."""
    n = features.shape[1]
    total = features.sum(1).square().sum(1) - n  # sum of the cosines of all pairs, each twice
    return 1 - total / (n * (n - 1))


def table(guide: Reward, others: list[str], budget: int, cells: Cells) -> list[str]:
    """Returns the lines of one table: means, paired differences to best-of-N and held-out ones to plain sampling."""
    parts: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in [*cells.select(guide=guide.name, budget=0), *cells.select(guide=guide.name, budget=budget)]:
        parts.setdefault(cell["key"]["sampler"], {})[cell["key"]["prompt"]] = cell
    if PLAIN not in parts or BASELINE not in parts:
        return []
    heads = ["sampler", "prompts", guide.name, "- BestOfN", *(f"{key} - unguided" for key in others)]
    lines = ["", f"## Guide {guide.name}, {budget} denoiser rows per image", ""]
    lines += [f"| {' | '.join([*heads, 'diversity', 'rows', 'decoded'])} |", "|---|" + "---:|" * (6 + len(others))]

    def mean(name: str, entry: Callable[[dict[str, Any]], float], prompts: Iterable[int]) -> float:
        found = [entry(parts[name][prompt]) for prompt in prompts]
        return sum(found) / len(found)

    def minus(name: str, base: str, reward: str) -> str:
        """Returns the difference of two samplers on the prompts of both."""
        both = sorted(parts[name].keys() & parts[base].keys())
        first, second = (torch.tensor([parts[each][p]["scores"][reward] for p in both]) for each in (name, base))
        return interval(first, second) if name != base and len(both) > 1 else ""

    order = [*entries(guide, 0), *entries(guide, budget)]
    for name in (name for name in order if name in parts):
        own = parts[name]
        entry = [str(len(own)), f"{mean(name, lambda cell: average(cell['scores'][guide.name]), own):.3f}"]
        entry += [minus(name, BASELINE, guide.name), *(minus(name, PLAIN, reward) for reward in others)]
        entry.append(f"{mean(name, lambda cell: cell['diversity'], own):.3f}")
        entry.append(f"{mean(name, lambda cell: cell['rows'], own):.0f}")
        entry.append(f"{mean(name, lambda cell: cell['decoded'], own):.0f}")
        lines.append(f"| {name} | {' | '.join(entry)} |")
    return lines


def average(numbers: list[float]) -> float:
    """Returns the mean."""
    return sum(numbers) / len(numbers)


def report(cells: Cells) -> str:
    """Returns the page."""
    lines = [
        "# Samplers at equal compute",
        "",
        f"The embedded model, T = {STEPS}, guidance scale 3, eta 1, {IMAGES} images of each prompt, same prompts and "
        "seeds; every count is the largest within the budget, in which a backward pass counts as two rows. Alpha "
        "is `auto`. `eta 0`: the chain is deterministic, and the start alone is searched. "
        "Differences are paired by prompt, with 95 % intervals (Student's t), over the prompts that both samplers have "
        "drawn. `CLIPScore-judge` is held out: a second CLIP, trained separately. Diversity is the mean of 1 - cosine "
        "of the CLIP embeddings over pairs of images of a prompt. `decoded` counts the images that the decoder made. "
        "Samplers with 25 rows do not scale with a budget and appear in each table. Drawn in float32, most of it on an "
        "H100, a part of 800 rows on a CPU. Made by "
        "`python -m benchmarks.samplers`, which continues where prompts are missing.",
    ]
    known = rewards("cpu")
    for guide in GUIDES:
        for budget in BUDGETS:
            lines += table(known[guide], [name for name in known if name != guide], budget, cells)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the missing parts and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many, at most {len(PROMPTS)}")
    parser.add_argument("--at-once", type=int, default=1, help="prompts in a batch; many on a GPU")
    parser.add_argument("--samplers", nargs="+", help="names in the table; by default all")
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished parts")
    parser.add_argument("--kept", type=Path, default=Path("build/samplers"), help="folder of new parts")
    add_arguments(parser)
    options = parser.parse_args()
    cells = Cells(DATA, options.kept)
    if not options.only_report:
        for job, found in spread(draw_cells, missing(cells, options), options):
            for key, cell in zip(job.keys(), found, strict=True):
                cells.add(key, cell)
            mean = average([average(cell["scores"][job.guide]) for cell in found])
            print(job.guide, job.budget, job.sampler, len(found), f"{mean:.3f}", found[0]["rows"], flush=True)
    cells.commit()
    text = report(cells)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


def missing(cells: Cells, options: argparse.Namespace) -> list[Job]:
    """Returns the prompts that are not drawn yet, in batches of one sampler; samplers alternate."""
    jobs, known = [], rewards("cpu")
    for budget in (0, *options.budgets):
        for start in range(0, options.prompts, options.at_once):
            prompts = tuple(range(start, min(start + options.at_once, options.prompts)))
            for guide in options.guides:
                for name in entries(known[guide], budget):
                    whole = Job(guide, budget, name, prompts)
                    new = [prompt for prompt, key in zip(prompts, whole.keys(), strict=True) if key not in cells]
                    if new and name in (options.samplers or [name]):
                        jobs.append(replace(whole, prompts=tuple(new)))
    return jobs


if __name__ == "__main__":
    main()
