"""The temperature `auto`: spreads of values along the chain, and SMC with it against fixed temperatures.

Keeps every finished entry in a JSON file, continues after the last one, and writes benchmarks/temperature.md from the
finished entries.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import PROMPTS, interval
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.smc import SMC
from svdd.samplers.toolbox.temperature import AUTO_MULTIPLE, AUTO_START
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

STEPS, PARTICLES = 25, 16  # of the spreads
SHOWN = (1, 3, 5, 7, 9, 11, 13, 15, 19, 23)
FIXED = {"Compressibility": 0.1, "CLIPScore": 0.01}  # tuned by hand for these rewards
CHOSEN_ON = 8  # the first prompts served to choose the multiple and the start; the table has the others
PROMPTS_OF = {8: 16}  # number of particles: the last prompt of its table


@torch.no_grad()
def spreads(diffusion: LatentDiffusion, rewards: list[Reward]) -> dict[str, Any]:
    """Returns the posterior-mean rewards of unguided particles, by reward, [prompts][steps][particles]."""
    found: dict[str, Any] = {reward.name: [] for reward in rewards}
    for k, prompt in enumerate(PROMPTS[:CHOSEN_ON]):
        state = Start(diffusion, [prompt], [1000 * k])(PARTICLES)
        for reward in rewards:
            found[reward.name].append([])
        while not state.done:
            state = state.propose()
            if state.i in SHOWN or state.done:
                for reward in rewards:
                    found[reward.name][-1].append(state.scores(reward).tolist())
    return found


@torch.no_grad()
def draw(diffusion: LatentDiffusion, sampler: Sampler, guide: Reward, held_out: Reward, last: int) -> dict[str, Any]:
    """Returns the scores and what the selections came to, an image for every prompt from CHOSEN_ON to `last`."""
    value = PosteriorMean()
    value.bind(guide, diffusion)
    found: dict[str, Any] = {"scores": [], "held_out": [], "selection": []}
    for k in range(CHOSEN_ON, last):
        final = sampler(Start(diffusion, [PROMPTS[k]], [1000 * k]), value)
        found["scores"] += guide.score(final.images, final.prompts).tolist()
        found["held_out"] += held_out.score(final.images, final.prompts).tolist()
        found["selection"] += final.context.trace.statistics(1)
    return found


def spread_table(found: dict[str, Any]) -> list[str]:
    """Returns the lines of the table of spreads."""
    lines = ["| step | " + " | ".join(f"{name}: spread | correlation" for name in found) + " |"]
    lines.append("|---:|" + "---:|---:|" * len(found))
    for j, step in enumerate(SHOWN):
        cells = []
        for values in found.values():
            x = torch.tensor(values, dtype=torch.float64)  # [prompts, steps, particles]
            ratio = x[:, j].std(1) / x[:, -1].std(1)
            correlation = torch.stack([torch.corrcoef(one[[j, -1]])[0, 1] for one in x])
            cells += [f"{float(ratio.mean()):.2f}", f"{float(correlation.mean()):.2f}"]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return lines


def comparison(guide: str, n: int, results: dict[str, Any]) -> list[str]:
    """Returns the lines of a table with N particles."""
    found = {name: results[key] for name in samplers(guide, n) if (key := f"{guide}-{n}-{name}") in results}
    if "BestOfN" not in found:
        return []
    lines = ["", f"## {guide}, N = {n}, {PROMPTS_OF[n] - CHOSEN_ON} prompts", ""]
    lines += ["| sampler | reward | - BestOfN | held out - BestOfN | resamplings | effective sample size | alpha |"]
    lines += ["|---|" + "---:|" * 6]
    best = {key: torch.tensor(found["BestOfN"][key])[:, None] for key in ("scores", "held_out")}
    for name, result in found.items():
        scores, held_out = (torch.tensor(result[key])[:, None] for key in ("scores", "held_out"))
        cells = [name, f"{float(scores.mean()):.4f}"]
        same = name == "BestOfN"
        cells += ["", ""] if same else [interval(scores, best["scores"]), interval(held_out, best["held_out"])]
        for key, form in (("resamplings", ".1f"), ("ess", ".2f"), ("alpha", ".3g")):
            numbers = [entry[key] for entry in result["selection"] if key in entry]
            cells.append("" if same or not numbers else format(sum(numbers) / len(numbers), form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def samplers(guide: str, n: int) -> dict[str, Sampler]:
    """Returns the compared samplers by name."""
    alpha = FIXED[guide]
    return {"BestOfN": BestOfN(n), f"SMC, alpha {alpha}": SMC(n, alpha=alpha), "SMC, alpha auto": SMC(n)}


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guides", nargs="+", default=list(FIXED))
    parser.add_argument("--particles", nargs="+", type=int, default=list(PROMPTS_OF))
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished entries")
    parser.add_argument("--kept", type=Path, default=Path("build/temperature"), help="folder of finished entries")
    options = parser.parse_args()
    clip, judge, jpeg = CLIPScore(), CLIPScore("emoji-judge"), Compressibility()
    guides: dict[str, tuple[Reward, Reward]] = {jpeg.name: (jpeg, clip), clip.name: (clip, judge)}
    diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0)
    options.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not (path := options.kept / "spreads.json").exists():
        path.write_text(json.dumps(spreads(diffusion, [jpeg, clip])))
    for name in () if options.only_report else options.guides:
        for n in options.particles:
            for label, sampler in samplers(name, n).items():
                path = options.kept / f"{name}-{n}-{label}.json"
                if not path.exists():
                    path.write_text(json.dumps(draw(diffusion, sampler, *guides[name], PROMPTS_OF[n])))
                    print(path.stem, flush=True)
    results = {path.stem: json.loads(path.read_text()) for path in options.kept.glob("*.json")}
    lines = [
        "# The temperature `auto`",
        "",
        f"The embedded model, T = {STEPS}, guidance scale 3, eta 1. Made by `python -m benchmarks.temperature`.",
        "",
        f"`auto` is {AUTO_MULTIPLE:g} standard deviations of the values of an image's own particles, at the first step "
        f"at or after {AUTO_START:.2f} T. Both numbers were chosen on the first {CHOSEN_ON} prompts "
        "([experiments.md](../docs/experiments.md)).",
        "",
        "## Spread of the values along the chain",
        "",
        f"Posterior-mean rewards of {PARTICLES} unguided particles for each of {CHOSEN_ON} prompts: the standard "
        "deviation among the particles divided by that of the final rewards, and the correlation with these.",
        "",
        *spread_table(results["spreads"]),
        "",
        "Early values of CLIPScore spread wider than the rewards and say little about them; those of the JPEG size "
        "spread less. A running maximum would keep the first, a measurement at the first step understate the second.",
    ]
    for name in FIXED:
        for n in PROMPTS_OF:
            lines += comparison(name, n, results)
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
