"""Every sampler with its default settings on rewards of three scales: does it select, or is it silently best-of-N?

Keeps every finished entry in a JSON file, continues after the last one, and writes benchmarks/default_settings.md.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

import svdd.samplers
from benchmarks.paired import PROMPTS
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

STEPS, IMAGES = 8, 2
STATISTICS = {"ess": ".2f", "resamplings": ".1f", "alpha": ".3g"}


def draw(diffusion: LatentDiffusion, sampler: Sampler, reward: Reward) -> dict[str, Any]:
    """Returns, for an image of each of the first prompts, reward, digest, rows and what the selections came to."""
    value = PosteriorMean()
    value.bind(reward, diffusion)
    try:
        sampler.check(diffusion, value)
    except UserError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"scores": [], "digests": [], "selection": [], "rows": []}
    for k in range(IMAGES):
        with torch.no_grad():
            final = sampler(Start(diffusion, [PROMPTS[k]], [1000 * k]), value)
            images = (final.images * 255).round().to(torch.uint8)
            found["scores"] += reward.score(final.images, final.prompts).tolist()
        found["digests"].append(hashlib.sha256(images.numpy().tobytes()).hexdigest())
        found["selection"] += final.context.trace.statistics(1)
        found["rows"].append(final.context.ledger.denoiser_rows)
    return found


def mean(result: dict[str, Any], name: str) -> float | None:
    """Returns a statistic's mean over the images, if it is known."""
    numbers = [entry[name] for entry in result["selection"] if name in entry]
    return sum(numbers) / len(numbers) if numbers else None


def line(name: str, result: dict[str, Any], best: dict[str, Any] | None, sampler: Sampler) -> str:
    """Returns a sampler's row of a table; `best` is best-of-N at equal rows with the same seeds."""
    if "refused" in result:
        return f"| {name} | refused: {result['refused'].partition(';')[0].partition(',')[0]} |" + " |" * 6
    known = {each: number for each in (*STATISTICS, "choices") if (number := mean(result, each)) is not None}
    equal = sum(one == other for one, other in zip(result["digests"], best["digests"], strict=True)) if best else None
    summary = known | {"spread": mean(result, "spread"), "alpha": {"mean": known.get("alpha", math.inf)}}
    warned = "warned" if idle(sampler, summary) else ""
    cells = [f"{sum(result['scores']) / IMAGES:.4g}", f"{sum(result['rows']) / IMAGES:.0f}"]
    cells += [format(known[each], form) if each in known else "" for each, form in STATISTICS.items()]
    cells += ["" if equal is None else f"{equal} of {IMAGES}", warned]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished entries")
    parser.add_argument("--kept", type=Path, default=Path("build/default_settings"), help="folder of finished entries")
    options = parser.parse_args()
    clip = CLIPScore()
    rewards = {"Compressibility": Compressibility(), "CLIPScore": clip, "1000 CLIPScore": WeightedSum([clip], [1000.0])}
    diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0)
    names = sorted(name for name in svdd.samplers.__all__ if name != "Sampler")
    samplers: dict[str, Sampler] = {name: getattr(svdd.samplers, name)() for name in names}
    options.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    def found(sampler: Sampler, label: str, reward: str) -> dict[str, Any]:
        path = options.kept / f"{reward}-{label}.json"
        if not path.exists():
            if options.only_report:
                return {}
            path.write_text(json.dumps(draw(diffusion, sampler, rewards[reward])))
            print(path.stem, flush=True)
        return json.loads(path.read_text())

    lines = [
        "# Default settings on rewards of three scales",
        "",
        f"Every sampler with its default settings; the embedded model, T = {STEPS}, guidance scale 3, eta 1, one image "
        f"of each of {IMAGES} prompts. ESS: effective sample size as a share of the rows, averaged over the selections "
        "with weights. Equal: images whose bytes equal those of best-of-N with the same denoiser rows and seeds."
        " A sampler without a row was not measured on that reward. Made by `python -m benchmarks.default_settings`.",
    ]
    for reward in rewards:
        lines += ["", f"## {reward}", ""]
        lines += ["| sampler | reward | denoiser rows | ESS | resamplings | alpha | equal | |", "|---|" + "---:|" * 7]
        for name, sampler in samplers.items():
            result, best = found(sampler, name, reward), None
            if "rows" in result and (n := round(sum(result["rows"]) / IMAGES / STEPS)) > 1 and name != "BestOfN":
                best = found(BestOfN(n), f"BestOfN({n})", reward)
            if result:  # else it is not measured yet
                lines.append(line(name, result, best, sampler))
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
