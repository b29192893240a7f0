"""The temperature `auto`: spreads of values along the chain, and SMC with it against fixed temperatures.

`benchmarks/data/temperature.jsonl` holds the finished entries, from which `--only-report` makes
benchmarks/temperature.md.
"""

import argparse
from dataclasses import asdict, dataclass
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
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.smc import SMC
from svdd.samplers.toolbox.temperature import AUTO_MULTIPLE, AUTO_START
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

STEPS, PARTICLES = 25, 16  # of the spreads
SHOWN = (1, 3, 5, 7, 9, 11, 13, 15, 19, 23)
FIXED = {"Compressibility": 0.1, "CLIPScore": 0.01}  # tuned by hand for these rewards
CHOSEN_ON = 8  # the first prompts served to choose the multiple and the start; the table has the others
NUMBERS, IMAGES = (8, 32), 2  # of particles, and of images of each prompt
HELD_OUT = {"Compressibility": "CLIPScore", "CLIPScore": "CLIPScore-judge"}
SPREADS = "spreads"
DATA = Path(__file__).parent / "data" / "temperature.jsonl"


@dataclass(frozen=True)
class Job:
    """An entry: a sampler with as many particles, or SPREADS."""

    guide: str
    particles: int
    sampler: str


@cache
def model(device: str) -> tuple[LatentDiffusion, dict[str, Reward]]:
    """Returns the chain, and the rewards by name."""
    diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0)
    found = (Compressibility(), CLIPScore(), CLIPScore("emoji-judge"))
    return diffusion.to(device), {reward.name: reward.to(device) for reward in found}


@torch.no_grad()
def measure(job: Job, device: str) -> dict[str, Any]:
    """Returns the entry of a job."""
    return spreads(job.guide, device) if job.sampler == SPREADS else draw(job, device)


def spreads(reward: str, device: str) -> dict[str, Any]:
    """Returns the posterior-mean rewards of unguided particles, [prompts][steps][particles]."""
    diffusion, rewards = model(device)
    found: list[list[list[float]]] = []
    for k, prompt in enumerate(PROMPTS[:CHOSEN_ON]):
        state = Start(diffusion, [prompt], [1000 * k])(PARTICLES)
        found.append([])
        while not state.done:
            state = state.propose()
            if state.i in SHOWN or state.done:
                found[-1].append([round(score, 6) for score in state.scores(rewards[reward]).flatten().tolist()])
    return {"values": found}


def draw(job: Job, device: str) -> dict[str, Any]:
    """Returns the scores, [prompts][images], and what the selections came to, for the prompts from CHOSEN_ON."""
    diffusion, rewards = model(device)
    value, sampler = PosteriorMean(), samplers(job.guide, job.particles)[job.sampler]
    value.bind(rewards[job.guide], diffusion)
    places = [(prompt, image) for prompt in range(CHOSEN_ON, len(PROMPTS)) for image in range(IMAGES)]
    texts = [PROMPTS[prompt] for prompt, _ in places]
    final = sampler(Start(diffusion, texts, [1000 * prompt + image for prompt, image in places]), value)
    found: dict[str, Any] = {"selection": final.context.trace.statistics(len(texts))}
    for key, name in (("scores", job.guide), ("held_out", HELD_OUT[job.guide])):
        found[key] = rewards[name].score(final.images, texts).view(-1, IMAGES).tolist()
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


def comparison(guide: str, n: int, cells: Cells) -> list[str]:
    """Returns the lines of a table with N particles."""
    known = {cell["key"]["sampler"]: cell for cell in cells.select(guide=guide, particles=n)}
    found = {name: known[name] for name in samplers(guide, n) if name in known}
    if "BestOfN" not in found:
        return []
    title = f"## {guide}, N = {n}, {len(PROMPTS) - CHOSEN_ON} prompts x {IMAGES} images"
    lines = [
        "",
        title,
        "",
        f"| sampler | reward | - BestOfN | {HELD_OUT[guide]} - BestOfN | resamplings | ESS | alpha |",
    ]
    lines += ["|---|" + "---:|" * 6]
    best = {key: torch.tensor(found["BestOfN"][key]) for key in ("scores", "held_out")}
    for name, result in found.items():
        scores, held_out = (torch.tensor(result[key]) for key in ("scores", "held_out"))
        entry = [name, f"{float(scores.mean()):.4f}"]
        same = name == "BestOfN"
        entry += ["", ""] if same else [interval(scores, best["scores"]), interval(held_out, best["held_out"])]
        for key, form in (("resamplings", ".1f"), ("ess", ".2f"), ("alpha", ".3g")):
            numbers = [own[key] for own in result["selection"] if key in own]
            entry.append("" if same or not numbers else format(sum(numbers) / len(numbers), form))
        lines.append(f"| {' | '.join(entry)} |")
    return lines


def samplers(guide: str, n: int) -> dict[str, Sampler]:
    """Returns the compared samplers by name."""
    alpha = FIXED[guide]
    return {"BestOfN": BestOfN(n), f"SMC, alpha {alpha}": SMC(n, alpha=alpha), "SMC, alpha auto": SMC(n)}


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guides", nargs="+", default=list(FIXED), choices=list(FIXED))
    parser.add_argument("--particles", nargs="+", type=int, default=list(NUMBERS))
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished entries")
    parser.add_argument("--kept", type=Path, default=Path("build/temperature"), help="folder of new entries")
    add_arguments(parser)
    options = parser.parse_args()
    cells = Cells(DATA, options.kept)
    jobs = [Job(guide, PARTICLES, SPREADS) for guide in options.guides]
    jobs += [Job(guide, n, name) for guide in options.guides for n in options.particles for name in samplers(guide, n)]
    if not options.only_report:
        for job, found in spread(measure, [job for job in jobs if asdict(job) not in cells], options):
            cells.add(asdict(job), found)
            print(*asdict(job).values(), flush=True)
    cells.commit()
    known = {name: cell["values"] for name in FIXED for cell in cells.select(guide=name, sampler=SPREADS)}
    lines = [
        "# The temperature `auto`",
        "",
        f"The embedded model, T = {STEPS}, guidance scale 3, eta 1, float32 on an H100. Made by "
        "`python -m benchmarks.temperature`.",
        "",
        f"`auto` is {AUTO_MULTIPLE:g} standard deviations of the values of an image's own particles, at the first step "
        f"at or after {AUTO_START:.2f} T. Both numbers were chosen on the first {CHOSEN_ON} prompts "
        "([experiments.md](../docs/explanation/experiments.md)).",
        "",
        "## Spread of the values along the chain",
        "",
        f"Posterior-mean rewards of {PARTICLES} unguided particles for each of {CHOSEN_ON} prompts: the standard "
        "deviation among the particles divided by that of the final rewards, and the correlation with these.",
        "",
        *spread_table(known),
        "",
        "Early values of CLIPScore spread wider than the rewards and say little about them; those of the JPEG size "
        "spread less. A running maximum would keep the first, a measurement at the first step understate the second.",
    ]
    for name in FIXED:
        for n in NUMBERS:
            lines += comparison(name, n, cells)
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
