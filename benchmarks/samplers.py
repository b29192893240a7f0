"""All samplers at equal compute on the embedded model: same prompts, same seeds, three budgets, two guide rewards.

Every finished part (a guide, a budget, a sampler, two prompts) is a file, so a run can be killed and continued, and
samplers or prompts added. `benchmarks/data/samplers.jsonl` holds the finished parts, from which `--only-report` makes
benchmarks/samplers.md.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cells
from benchmarks.paired import PROMPTS, interval
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

STEPS, AT_ONCE = 25, 4
IMAGES = 2  # per prompt
PLAIN, BASELINE, ON_THE_ODE = "Unguided", "BestOfN", ", eta 0"
DATA = Path(__file__).parent / "data" / "samplers.jsonl"


@cache
def chain(eta: float) -> StableDiffusion:
    """Returns the embedded model with as much noise in its steps."""
    return StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=eta)


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


@torch.no_grad()
def draw(
    diffusion: LatentDiffusion,
    sampler: Sampler,
    guide: Reward,
    others: list[Reward],
    prompts: Any = PROMPTS,
    value: Value | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Samples IMAGES images of every prompt; returns scores [prompts][images], cost and diversity.

    `first` is the number of the first prompt, which determines the seeds.
    """
    value, clip = value or PosteriorMean(), next(r for r in (guide, *others) if r.name == "CLIPScore")
    value.bind(guide, diffusion)
    rewards = (guide, *others)
    result: dict[str, Any] = {"scores": {reward.name: [] for reward in rewards}, "diversity": []}
    rows, seconds = 0.0, 0.0
    for start in range(0, len(prompts), AT_ONCE // IMAGES):
        texts = [prompt for prompt in prompts[start : start + AT_ONCE // IMAGES] for _ in range(IMAGES)]
        seeds = [1000 * (first + start + k // IMAGES) + k % IMAGES for k in range(len(texts))]
        begin = Start(diffusion, texts, seeds)
        began = time.process_time()
        final = sampler(begin, value)
        pictures = final.images
        seconds += time.process_time() - began
        rows += final.context.ledger.denoiser_rows + 2 * final.context.ledger.gradient_rows
        for reward in rewards:
            result["scores"][reward.name] += reward.score(pictures, texts).view(-1, IMAGES).tolist()
        features = clip.image_features(pictures)
        result["diversity"] += distances(features.view(-1, IMAGES, features.shape[-1])).tolist()
    count = len(prompts) * IMAGES
    return result | {"rows": rows / count, "seconds": seconds / count}


def distances(features: torch.Tensor) -> torch.Tensor:
    """Returns the mean of 1 - cosine over all pairs in each group; features of unit length, [groups, n, d]."""
    n = features.shape[1]
    total = features.sum(1).square().sum(1) - n  # sum of the cosines of all pairs, each twice
    return 1 - total / (n * (n - 1))


def table(guide: Reward, others: list[Reward], budget: int, cells: Cells) -> list[str]:
    """Returns the lines of one table: means, paired differences to best-of-N and held-out ones to plain sampling."""
    parts: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in [*cells.select(guide=guide.name, budget=0), *cells.select(guide=guide.name, budget=budget)]:
        parts.setdefault(cell["key"]["sampler"], {})[cell["key"]["prompt"]] = cell
    if PLAIN not in parts or BASELINE not in parts:
        return []
    held_out = [reward.name for reward in others]
    heads = ["sampler", "prompts", guide.name, "- BestOfN", *(f"{key} - unguided" for key in held_out)]
    lines = ["", f"## Guide {guide.name}, {budget} denoiser rows per image", ""]
    lines += [f"| {' | '.join([*heads, 'diversity', 'rows', 'seconds'])} |", "|---|" + "---:|" * (6 + len(held_out))]

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
        own, both = parts[name], parts[name].keys() & parts[BASELINE].keys()
        entry = [str(len(own)), f"{mean(name, lambda cell: average(cell['scores'][guide.name]), own):.3f}"]
        entry += [minus(name, BASELINE, guide.name), *(minus(name, PLAIN, reward) for reward in held_out)]
        entry.append(f"{mean(name, lambda cell: cell['diversity'], own):.3f}")
        entry.append(f"{mean(name, lambda cell: cell['rows'], own):.0f}")
        slower = mean(name, lambda cell: cell["seconds"], both) / mean(BASELINE, lambda cell: cell["seconds"], both)
        lines.append(f"| {name} | {' | '.join(entry)} | {slower:.2f} |")
    return lines


def average(numbers: list[float]) -> float:
    """Returns the mean."""
    return sum(numbers) / len(numbers)


def report(cells: Cells, guides: list[tuple[Reward, list[Reward]]], budgets: list[int]) -> str:
    """Returns the page."""
    lines = [
        "# Samplers at equal compute",
        "",
        f"The embedded model, T = {STEPS}, guidance scale 3, eta 1, {IMAGES} images of each prompt, same prompts and "
        "seeds; every count is the largest within the budget, in which a backward pass counts as two rows. Alpha "
        "is `auto`. `eta 0`: the chain is deterministic, and the start alone is searched. "
        "Differences are paired by prompt, with 95 % intervals (Student's t), over the prompts that both samplers have "
        "drawn. `CLIPScore-judge` is held out: a second CLIP, trained separately. Diversity is the mean of 1 - cosine "
        "of the CLIP embeddings over pairs of images of a prompt. Seconds are CPU seconds on one thread divided by "
        "those of BestOfN. Samplers with 25 rows do not scale with a budget and appear in each table. Made by "
        "`python -m benchmarks.samplers`, which continues where prompts are missing.",
    ]
    for guide, others in guides:
        for budget in budgets:
            lines += table(guide, others, budget, cells)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the missing parts and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guides", nargs="+", default=["Compressibility", "CLIPScore"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[200, 400, 800])
    parser.add_argument("--prompts", type=int, default=12, help=f"how many, at most {len(PROMPTS)}")
    parser.add_argument("--samplers", nargs="+", help="names in the table; by default all")
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished parts")
    parser.add_argument("--kept", type=Path, default=Path("build/samplers"), help="folder of new parts")
    options = parser.parse_args()
    clip, judge, jpeg = CLIPScore(), CLIPScore("emoji-judge"), Compressibility()
    guides: list[tuple[Reward, list[Reward]]] = [(jpeg, [clip, judge]), (clip, [judge, jpeg])]
    torch.set_num_threads(1)  # so that CPU seconds are comparable
    cells = Cells(DATA, options.kept)
    if not options.only_report:
        chosen = [(guide, others) for guide, others in guides if guide.name in options.guides]
        for budget in (0, *options.budgets):
            measure(cells, chosen, budget, options)
    cells.commit()
    text = report(cells, guides, [200, 400, 800])
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


def measure(cells: Cells, guides: list[tuple[Reward, list[Reward]]], budget: int, options: argparse.Namespace) -> None:
    """Measures the missing parts of one budget; samplers alternate, so that background load affects all alike."""
    fitted: dict[tuple[str, str], Sampler] = {}
    for prompt in range(options.prompts):
        for guide, others in guides:
            for name, sampler in entries(guide, budget).items():
                key = {"guide": guide.name, "budget": budget, "sampler": name, "prompt": prompt}
                if key in cells or name not in (options.samplers or [name]):
                    continue
                diffusion = chain(0.0 if name.endswith(ON_THE_ODE) else 1.0)
                if (guide.name, name) not in fitted:
                    value = PosteriorMean()
                    value.bind(guide, diffusion)
                    fitted[guide.name, name] = fit_budget(sampler(), budget, diffusion, value) if budget else sampler()
                found = draw(
                    diffusion, fitted[guide.name, name], guide, others, PROMPTS[prompt : prompt + 1], first=prompt
                )
                scores = {reward: [round(score, 6) for score in own[0]] for reward, own in found["scores"].items()}
                kept = {"scores": scores, "diversity": round(found["diversity"][0], 6)}
                cells.add(key, kept | {kind: round(found[kind], 3) for kind in ("rows", "seconds")})
                print(*key.values(), f"{scores[guide.name]}, {found['rows']:.0f} rows", flush=True)


if __name__ == "__main__":
    main()
