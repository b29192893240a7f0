"""Every sampler with its default settings on rewards of three scales: does it select, or is it silently best-of-N?

`benchmarks/data/default_settings.jsonl` holds the finished entries, from which `--only-report` makes
benchmarks/default_settings.md.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import svdd.samplers
from benchmarks.cells import Cells
from benchmarks.paired import PROMPTS
from benchmarks.workers import add_arguments, spread
from svdd import UserError
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.evaluation.selections import idle
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.rewards.weighted_sum import WeightedSum
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

STEPS, IMAGES = 20, 4
SAME = 1e-3  # relative difference of rewards of the same image
REWARDS = ("Compressibility", "CLIPScore", "1000 CLIPScore")
DATA = Path(__file__).parent / "data" / "default_settings.jsonl"
STATISTICS = {"ess": ".2f", "resamplings": ".1f", "alpha": ".3g"}


@dataclass(frozen=True)
class Job:
    """A sampler, with its default settings or, for BestOfN(n), with n particles, on a reward."""

    reward: str
    sampler: str
    particles: int = 0


@cache
def model(device: str) -> tuple[LatentDiffusion, dict[str, Reward]]:
    """Returns the chain, and the rewards by name."""
    diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0)
    clip = CLIPScore()
    found = (Compressibility(), clip, WeightedSum([clip], [1000.0]))
    return diffusion.to(device), dict(zip(REWARDS, (reward.to(device) for reward in found), strict=True))


@torch.no_grad()
def draw(job: Job, device: str) -> dict[str, Any]:
    """Returns, for an image of each of the first prompts, reward, rows and what the selections came to."""
    diffusion, rewards = model(device)
    value, reward = PosteriorMean(), rewards[job.reward]
    value.bind(reward, diffusion)
    sampler = BestOfN(job.particles) if job.particles else getattr(svdd.samplers, job.sampler)()
    try:
        sampler.check(diffusion, value)
    except UserError as error:
        return {"refused": str(error)}
    final = sampler(Start(diffusion, PROMPTS[:IMAGES], [1000 * k for k in range(IMAGES)]), value)
    return {
        "scores": reward.score(final.images, final.prompts).tolist(),
        "selection": final.context.trace.statistics(IMAGES),
        "rows": final.context.ledger.denoiser_rows / IMAGES,
    }


def equal_rows(result: dict[str, Any]) -> int:
    """Returns the particles with which best-of-N costs as much."""
    return round(result["rows"] / STEPS)


def mean(result: dict[str, Any], name: str) -> float | None:
    """Returns a statistic's mean over the images, if it is known."""
    numbers = [entry[name] for entry in result["selection"] if name in entry]
    return sum(numbers) / len(numbers) if numbers else None


def line(name: str, result: dict[str, Any], best: dict[str, Any] | None, sampler: Sampler) -> str:
    """Returns a sampler's row of a table; `best` is best-of-N at equal rows with the same seeds."""
    if "refused" in result:
        return f"| {name} | refused: {result['refused'].partition(';')[0].partition(',')[0]} |" + " |" * 6
    known = {each: number for each in (*STATISTICS, "choices") if (number := mean(result, each)) is not None}
    pairs = zip(result["scores"], best["scores"], strict=True) if best else ()
    equal = sum(math.isclose(*pair, rel_tol=SAME) for pair in pairs) if best else None
    summary = known | {"spread": mean(result, "spread"), "alpha": {"mean": known.get("alpha", math.inf)}}
    warned = "warned" if idle(sampler, summary) else ""
    cells = [f"{sum(result['scores']) / IMAGES:.4g}", f"{result['rows']:.0f}"]
    cells += [format(known[each], form) if each in known else "" for each, form in STATISTICS.items()]
    cells += ["" if equal is None else f"{equal} of {IMAGES}", warned]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished entries")
    parser.add_argument("--kept", type=Path, default=Path("build/default_settings"), help="folder of new entries")
    add_arguments(parser)
    options = parser.parse_args()
    names = sorted(name for name in svdd.samplers.__all__ if name != "Sampler")
    cells = Cells(DATA, options.kept)

    def measure(jobs: list[Job]) -> None:
        for job, found in spread(draw, [job for job in jobs if asdict(job) not in cells], options):
            cells.add(asdict(job), found)
            print(*asdict(job).values(), flush=True)

    def results(reward: str) -> dict[str, dict[str, Any]]:
        return {cell["key"]["sampler"]: cell for cell in cells.select(reward=reward, particles=0)}

    if not options.only_report:
        measure([Job(reward, name) for reward in REWARDS for name in names])
        counts = {
            (reward, equal_rows(cell)) for reward in REWARDS for cell in results(reward).values() if "rows" in cell
        }
        measure([Job(reward, "BestOfN", n) for reward, n in sorted(counts) if n > 1])
    cells.commit()
    lines = [
        "# Default settings on rewards of three scales",
        "",
        f"Every sampler with its default settings; the embedded model, T = {STEPS}, guidance scale 3, eta 1, one image "
        f"of each of {IMAGES} prompts. ESS: effective sample size as a share of the rows, averaged over the selections "
        "with weights. Equal: images whose reward is that of best-of-N with the same denoiser rows and seeds, to "
        f"{SAME:g}; rounding differs with the number of rows. Float32 on an H100. Made by "
        "`python -m benchmarks.default_settings`.",
    ]
    for reward in REWARDS:
        lines += ["", f"## {reward}", ""]
        lines += ["| sampler | reward | denoiser rows | ESS | resamplings | alpha | equal | |", "|---|" + "---:|" * 7]
        for name, result in sorted(results(reward).items()):
            best = None
            if "rows" in result and name != "BestOfN":
                same = cells.select(reward=reward, sampler="BestOfN", particles=equal_rows(result))
                best = same[0] if same else None
            lines.append(line(name, result, best, getattr(svdd.samplers, name)()))
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
