"""Searches over starts on the ODE (eta = 0), at equal denoiser rows, on the embedded models.

A run with many rows contains the run with fewer: the trace states the best value after every generation. So every
sampler runs once per chain and guide, with the largest budget. Keeps every finished entry in a JSON file,
continues after the last one, and writes benchmarks/starts.md from the finished entries.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import PROMPTS, interval
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.budget import fit_budget
from svdd.samplers.cross_entropy_search import CrossEntropySearch
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.posterior_mean import PosteriorMean

BUDGETS = (200, 400, 800)
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
    first = 1 if isinstance(sampler, ZeroOrderSearch) else 0  # it records no selection of its only first start
    count = getattr(sampler, "num_starts", 1)
    evaluated = [count + (k + first) * sampler.num_candidates for k in range(len(selections))]  # type: ignore[attr-defined]
    return evaluated, torch.stack([selection.values.amax(1) for selection in selections], 1)


@torch.no_grad()
def measure(
    chain: str, guide: Reward, others: list[Reward], name: str, most: int, prompts: tuple[str, ...] = PROMPTS
) -> dict[str, Any]:
    """Runs one search with `most` rows per image; returns the best rewards by budget, [prompts], and held-out ones."""
    diffusion, value = CHAINS[chain](), PosteriorMean()
    value.bind(guide, diffusion)
    sampler, steps = fit_budget(SAMPLERS[name](), most, diffusion, value), diffusion.num_inference_steps
    began = time.process_time()
    final = sampler(Start(diffusion, prompts, range(len(prompts))), value)
    seconds = time.process_time() - began
    evaluated, best = progress(sampler, final)
    scores, rows = {}, {}
    for budget in (budget for budget in BUDGETS if budget <= most):
        last = max(k for k, count in enumerate(evaluated) if count * steps <= budget)
        scores[budget], rows[budget] = best[:, last].tolist(), evaluated[last] * steps
    held_out = {other.name: other.score(final.images, list(prompts)).tolist() for other in others}
    return {"scores": scores, "rows": rows, "held_out": held_out, "seconds": seconds / len(prompts)}


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns the page."""
    lines = [
        "# Searches over starts on the ODE",
        "",
        f"eta = 0, {len(PROMPTS)} prompts, one image of each, same seeds, default settings; the count of generations "
        "(of starts for `RandomSearch`) is the largest within the budget of denoiser rows per image. Guidance scale 3 "
        "(`emoji-flow`: 2). Differences are paired by prompt, with 95 % intervals (Student's t). The last columns are "
        "for the largest budget: held-out scores as differences from `RandomSearch`, and CPU seconds per image on one "
        "thread of a shared machine. Made by `python -m benchmarks.starts`.",
    ]
    for chain in CHAINS:
        for guide in ("Compressibility", "CLIPScore"):
            found = {name: results[key] for name in SAMPLERS if (key := f"{chain}/{guide}/{name}") in results}
            if RANDOM in found:
                lines += table(f"## {chain}, guide {guide}", found)
    return "\n".join(lines) + "\n"


def table(title: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the lines of one chain and guide, with the budgets that all of its samplers have."""
    others = list(found[RANDOM]["held_out"])
    budgets = [budget for budget in BUDGETS if all(str(budget) in entry["scores"] for entry in found.values())]
    heads = ["rows", "sampler", "reward", f"- {RANDOM}", f"- {CLIMB}", *others, "seconds"]
    lines = ["", title, "", f"| {' | '.join(heads)} |", "|---:|---|" + "---:|" * (len(heads) - 2)]

    def scores(name: str, *path: str) -> Tensor:
        entry: Any = found[name]
        for key in path:
            entry = entry[key]
        return torch.tensor(entry)[:, None]

    for budget in budgets:
        for name, result in found.items():
            own = scores(name, "scores", str(budget))
            cells = [f"{result['rows'][str(budget)]}", f"`{name}`", f"{float(own.mean()):.3f}"]
            for base in (RANDOM, CLIMB):
                known = base in found and name != base
                cells.append(interval(own, scores(base, "scores", str(budget))) if known else "")
            for other in others:
                known = name != RANDOM and budget == budgets[-1]
                held_out = (scores(each, "held_out", other) for each in (name, RANDOM))
                cells.append(interval(*held_out) if known else "")
            cells.append(f"{result['seconds']:.1f}" if budget == budgets[-1] else "")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures the missing entries and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", nargs="+", default=list(CHAINS))
    parser.add_argument("--guides", nargs="+", default=["Compressibility", "CLIPScore"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--rows", type=int, default=max(BUDGETS), choices=BUDGETS, help="largest budget")
    parser.add_argument("--kept", type=Path, default=Path("build/starts"), help="folder of finished entries")
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that CPU seconds are comparable
    clip, judge, jpeg = CLIPScore(), CLIPScore("emoji-judge"), Compressibility()
    guides: dict[str, tuple[Reward, list[Reward]]] = {
        jpeg.name: (jpeg, [clip, judge]),
        clip.name: (clip, [judge, jpeg]),
    }
    keys = [f"{c}/{g}/{s}" for c in options.chains for g in options.guides for s in options.samplers]
    for key in keys:
        path = options.kept / (key.replace("/", "--") + ".json")
        if not path.exists() or str(options.rows) not in json.loads(path.read_text())["scores"]:
            chain, guide, name = key.split("/")
            path.write_text(json.dumps(measure(chain, *guides[guide], name, options.rows)))
            print(key, flush=True)
    results = {}
    for key in (f"{c}/{g}/{s}" for c in CHAINS for g in guides for s in SAMPLERS):
        if (path := options.kept / (key.replace("/", "--") + ".json")).exists():
            results[key] = json.loads(path.read_text())
    page = report(results)
    print(page)
    Path(__file__).with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
