"""Transitions of a flow model at equal compute: best-of-N on the ODE, SMC and SVDD on chains with noise.

Samples in the order of the table, keeps every finished entry in a JSON file, continues after the last one, and writes
benchmarks/transitions.md from the finished entries.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import PROMPTS, interval
from benchmarks.samplers import IMAGES, draw
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.rewards.clip import CLIPScore
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import fit_budget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.values.posterior_mean import PosteriorMean

GUIDANCE, ROWS = 2.0, 400  # network rows per image: two per denoiser row, because of the guidance
ALPHA = 0.01
WEIGH = 5  # times that SMC weighs its particles before the end
CHAINS: dict[str, dict[str, Any]] = {  # each takes 25 network evaluations per particle, or 24
    "ODE": {"eta": 0.0},
    "DDPM": {},
    "cps 0.7": {"noise": "cps", "eta": 0.7},
    "fresh": {"noise": "fresh"},
    "DDPM, VP levels": {"scheduler": "ddpm"},
    "GLASS 5 x 5": {"num_inference_steps": 5, "inner_steps": 5, "rho": 0.4},
    "GLASS 12 x 2": {"num_inference_steps": 12, "inner_steps": 2, "rho": 0.4},
}
BASELINE, GLASS = "BestOfN/ODE", "SMC/GLASS 5 x 5"


def entries() -> dict[str, Callable[[int], Sampler]]:
    """Returns the samplers of each cell, `sampler/chain`, given the number of steps of the chain."""
    table: dict[str, Callable[[int], Sampler]] = {f"Unguided/{chain}": lambda _: Unguided() for chain in CHAINS}
    table[BASELINE] = lambda _: BestOfN()
    noisy = [chain for chain in CHAINS if chain != "ODE"]
    table |= {f"SMC/{chain}": lambda steps: SMC(alpha=ALPHA, guide_every=max(1, steps // WEIGH)) for chain in noisy}
    return table | {f"SVDD/{chain}": lambda _: SVDD() for chain in noisy}


def measure(key: str, prompts: Sequence[int] = range(len(PROMPTS))) -> dict[str, Any]:
    """Samples one cell; returns scores, cost and diversity."""
    options = {"num_inference_steps": 25} | CHAINS[key.split("/")[1]]
    diffusion = StableDiffusion3("emoji-flow", guidance_scale=GUIDANCE, **options)
    guide, preview = CLIPScore(), PosteriorMean(decoder="tiny")
    sampler = entries()[key](options["num_inference_steps"])
    if not isinstance(sampler, Unguided):
        sampler = fit_budget(sampler, ROWS // 2, diffusion, preview)
    return draw(diffusion, sampler, guide, [guide, CLIPScore("emoji-judge")], prompts, preview)


def report(results: dict[str, dict[str, Any]]) -> str:
    """Returns the page."""
    lines = [
        "# Transitions of a flow model at equal compute",
        "",
        f"`emoji-flow` at guidance scale {GUIDANCE:g}, {len(PROMPTS)} prompts x {IMAGES} images, the same seeds; guide "
        f"CLIPScore, at most {ROWS} network rows per image, two per evaluation. A chain takes 25 evaluations per "
        "particle: 25 steps, or 5 GLASS steps of 5 inner steps, or 12 of 2 (24), both at rho 0.4. SMC: alpha "
        f"{ALPHA:g}, weighs {WEIGH} times (6 in GLASS 12 x 2); SVDD chooses the best candidate at each step; both see "
        "the posterior mean through the small decoder. `CLIPScore-judge` is held out: a second CLIP, trained "
        "separately, which the model does not contain. Differences are from best-of-N on the ODE, paired by prompt, "
        "with 95 % intervals (Student's t). Diversity is the mean of 1 - cosine of the CLIP embeddings of a prompt's "
        "images. Made by `python -m benchmarks.transitions`.",
        "",
        "| sampler | chain | CLIPScore | - best-of-N, ODE | SMC, GLASS 5 x 5 - it "
        "| CLIPScore-judge | - best-of-N, ODE | diversity | rows |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def scores(key: str, name: str) -> torch.Tensor:
        return torch.tensor(results[key]["scores"][name])

    for key, result in results.items():
        cells = []
        for name in ("CLIPScore", "CLIPScore-judge"):
            found = scores(key, name)
            cells += [f"{float(found.mean()):.3f}", "" if key == BASELINE else interval(found, scores(BASELINE, name))]
            if name == "CLIPScore":
                same = key == GLASS or GLASS not in results
                cells.append("" if same else interval(scores(GLASS, name), found))
        cells.append(f"{sum(result['diversity']) / len(result['diversity']):.3f}")
        lines.append(f"| {' | '.join([*key.split('/'), *cells])} | {2 * result['rows']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the missing cells and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(entries()), help="cells to measure: sampler/chain")
    parser.add_argument("--kept", type=Path, default=Path("build/transitions"), help="folder of finished cells")
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that cells can be measured side by side
    paths = {key: options.kept / (key.replace("/", "--") + ".json") for key in entries()}
    for key in options.only:
        if not paths[key].exists():
            paths[key].write_text(json.dumps(measure(key)))
            print(key, flush=True)
    results = {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}
    if BASELINE in results:
        Path(__file__).with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
