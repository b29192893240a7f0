"""Searches over starts on the ODE (eta = 0), at equal denoiser rows, on the embedded models.

A run with many rows contains the run with fewer: the trace states the best value after every generation. So every
sampler runs once per chain and guide, with the largest budget. `benchmarks/data/starts.jsonl` holds the finished runs,
from which `--only-report` makes benchmarks/starts.md.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import Cells
from benchmarks.paired import PROMPTS, interval
from benchmarks.samplers import rewards
from benchmarks.workers import add_arguments, spread
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.samplers.base import Sampler
from svdd.samplers.budget import fit_budget
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.start_search import StartSearch
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean

BUDGETS, IMAGES = (200, 400, 800), 2  # images of each prompt
GUIDES = ("Compressibility", "CLIPScore")
DATA = Path(__file__).parent / "data" / "starts.jsonl"
CHAINS: dict[str, Callable[[], LatentDiffusion]] = {
    "emoji-sd, T = 5": lambda: StableDiffusion("emoji", num_inference_steps=5, guidance_scale=3.0, eta=0.0),
    "emoji-sd, T = 10": lambda: StableDiffusion("emoji", num_inference_steps=10, guidance_scale=3.0, eta=0.0),
    "emoji-sd, T = 25": lambda: StableDiffusion("emoji", num_inference_steps=25, guidance_scale=3.0, eta=0.0),
    "emoji-flow, T = 10": lambda: StableDiffusion3("emoji-flow", num_inference_steps=10, guidance_scale=2.0, eta=0.0),
}
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "RandomSearch": RandomSearch,
    "ZeroOrderSearch": ZeroOrderSearch,
    "EvolutionarySearch": EvolutionarySearch,
    "CrossEntropySearch": CrossEntropySearch,
}
RANDOM, CLIMB = "RandomSearch", "ZeroOrderSearch"


def progress(sampler: Sampler, final: State) -> tuple[list[int], Tensor]:
    """Returns the number of starts evaluated after each generation, and the best reward, [images, generations]."""
    selections = final.context.trace.selections
    if isinstance(sampler, RandomSearch):
        best = selections[0].values.cummax(1).values
        return list(range(1, best.shape[1] + 1)), best
    assert isinstance(sampler, StartSearch)
    evaluated = [sampler.num_starts + k * sampler.num_candidates for k in range(len(selections))]
    return evaluated, torch.stack([selection.values.amax(1) for selection in selections], 1)


@dataclass(frozen=True)
class Job:
    """A search."""

    chain: str
    guide: str
    sampler: str


@torch.no_grad()
def measure(job: Job, device: str) -> dict[str, Any]:
    """Returns the best rewards by budget, [prompts][images], and those of the held-out ones for the largest budget."""
    diffusion, value, guide = CHAINS[job.chain]().to(device), PosteriorMean(), rewards(device)[job.guide]
    value.bind(guide, diffusion)
    sampler = fit_budget(SAMPLERS[job.sampler](), max(BUDGETS), diffusion, value)
    places = [(prompt, image) for prompt in range(len(PROMPTS)) for image in range(IMAGES)]
    texts = [PROMPTS[prompt] for prompt, _ in places]
    final = sampler(Start(diffusion, texts, [1000 * prompt + image for prompt, image in places]), value)
    evaluated, best = progress(sampler, final)
    scores, rows = {}, {}
    for budget in BUDGETS:
        last = max(k for k, count in enumerate(evaluated) if count * diffusion.num_inference_steps <= budget)
        scores[str(budget)] = _rounded(best[:, last])
        rows[str(budget)] = evaluated[last] * diffusion.num_inference_steps
    others = [reward for name, reward in rewards(device).items() if name != job.guide]
    held_out = {other.name: _rounded(other.score(final.images, texts)) for other in others}
    return {"scores": scores, "rows": rows, "held_out": held_out}


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(score, 6) for score in own] for own in scores.view(-1, IMAGES).tolist()]


def report(cells: Cells) -> str:
    """Returns the page."""
    lines = [
        "# Searches over starts on the ODE",
        "",
        f"eta = 0, {len(PROMPTS)} prompts x {IMAGES} images, same seeds, default settings; the count of generations "
        "(of starts for `RandomSearch`) is the largest within the budget of denoiser rows per image. Guidance scale 3 "
        "(`emoji-flow`: 2). Differences are paired by prompt, with 95 % intervals (Student's t). The last columns are "
        "held-out rewards for the largest budget, as differences from `RandomSearch`. Drawn in float32 on an H100, "
        "in part on a CPU. Made by "
        "`python -m benchmarks.starts`.",
    ]
    for chain in CHAINS:
        for guide in GUIDES:
            found = {cell["key"]["sampler"]: cell for cell in cells.select(chain=chain, guide=guide)}
            if RANDOM in found:
                order = {name: found[name] for name in SAMPLERS if name in found}
                lines += table(f"## {chain}, guide {guide}", order)
    return "\n".join(lines) + "\n"


def table(title: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of one chain and guide."""
    others = list(found[RANDOM]["held_out"])
    heads = ["rows", "sampler", "reward", f"- {RANDOM}", f"- {CLIMB}", *others]
    lines = ["", title, "", f"| {' | '.join(heads)} |", "|---:|---|" + "---:|" * (len(heads) - 2)]
    for budget in map(str, BUDGETS):
        scores = {name: torch.tensor(cell["scores"][budget]) for name, cell in found.items()}
        for name, cell in found.items():
            entry = [f"{cell['rows'][budget]}", f"`{name}`", f"{float(scores[name].mean()):.3f}"]
            for base in (RANDOM, CLIMB):
                known = base in found and name != base
                entry.append(interval(scores[name], scores[base]) if known else "")
            for other in others:
                known = name != RANDOM and budget == str(BUDGETS[-1])
                own, plain = (torch.tensor(found[each]["held_out"][other]) for each in (name, RANDOM))
                entry.append(interval(own, plain) if known else "")
            lines.append(f"| {' | '.join(entry)} |")
    return lines


def main() -> None:
    """Measures the missing runs and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", nargs="+", default=list(CHAINS), choices=list(CHAINS))
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished runs")
    parser.add_argument("--kept", type=Path, default=Path("build/starts"), help="folder of new runs")
    add_arguments(parser)
    options = parser.parse_args()
    cells = Cells(DATA, options.kept)
    jobs = [Job(*each) for each in product(options.chains, options.guides, options.samplers)]
    if not options.only_report:
        for job, found in spread(measure, [job for job in jobs if asdict(job) not in cells], options):
            cells.add(asdict(job), found)
            print(*asdict(job).values(), flush=True)
    cells.commit()
    page = report(cells)
    print(page)
    Path(__file__).with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
