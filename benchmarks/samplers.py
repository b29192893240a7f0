"""All samplers at equal compute on the embedded model: same prompts, same seeds, two budgets, two guide rewards.

Samples in the order of the table, keeps every finished entry in a JSON file, continues after the last one, and writes
benchmarks/samplers.md from the finished entries.
"""

import argparse
import json
import time
from collections.abc import Callable
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
from svdd.samplers.beam_search import BeamSearch
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.budget import fit_budget
from svdd.samplers.dps import DPS
from svdd.samplers.progressive_pruning import ProgressivePruning
from svdd.samplers.random_search import RandomSearch
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean

STEPS, AT_ONCE = 25, 4
ALPHA = {"Compressibility": 0.1, "CLIPScore": 0.01}  # about 1/2 and 1/3 of the spread within a prompt
IMAGES = 2  # per prompt
PLAIN, BASELINE = "Unguided", "BestOfN"


def entries(guide: Reward, budget: int) -> dict[str, Callable[[], Sampler]]:
    """Returns the samplers by their name in the table; a budget sets their counts."""
    if budget == 0:
        return unbudgeted(guide)
    alpha = ALPHA[guide.name]
    table: dict[str, Callable[[], Sampler]] = {
        BASELINE: BestOfN,
        "SVDD": SVDD,
        "BeamSearch, 4 beams": lambda: BeamSearch(num_beams=4),
        "BlockwiseBestOfN, blocks of 5": lambda: BlockwiseBestOfN(block_size=5),
        f"SMC, alpha {alpha}": lambda: SMC(alpha=alpha),
        "ProgressivePruning": ProgressivePruning,
        "RandomSearch": RandomSearch,
        **({"ZeroOrderSearch, 7 neighbours": lambda: ZeroOrderSearch(num_candidates=7)} if budget == 200 else {}),
        **({"ZeroOrderSearch, 5 neighbours": lambda: ZeroOrderSearch(num_candidates=5)} if budget > 200 else {}),
    }
    if budget == 200:  # a variant, omitted from the more expensive tables
        table[f"SMC, alpha {alpha}, max, exponential"] = lambda: SMC(
            alpha=alpha, potential="max", tempering="exponential"
        )
    if guide.differentiable:
        table[f"TwistedSMC, alpha {alpha}"] = lambda: TwistedSMC(alpha=alpha)
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
) -> dict[str, Any]:
    """Samples IMAGES images of every prompt; returns scores [prompts][images], cost and diversity."""
    value, clip = value or PosteriorMean(), next(r for r in (guide, *others) if r.name == "CLIPScore")
    value.bind(guide, diffusion)
    rewards = (guide, *others)
    result: dict[str, Any] = {"scores": {reward.name: [] for reward in rewards}, "diversity": []}
    rows, seconds, everything = 0.0, 0.0, []
    for start in range(0, len(prompts), AT_ONCE // IMAGES):
        texts = [prompt for prompt in prompts[start : start + AT_ONCE // IMAGES] for _ in range(IMAGES)]
        seeds = [1000 * (start + k // IMAGES) + k % IMAGES for k in range(len(texts))]
        begin = Start(diffusion, texts, seeds)
        began = time.process_time()
        final = sampler(begin, value)
        pictures = final.images
        seconds += time.process_time() - began
        rows += final.context.ledger.denoiser_rows
        for reward in rewards:
            result["scores"][reward.name] += reward.score(pictures, texts).view(-1, IMAGES).tolist()
        features = clip.image_features(pictures)
        everything.append(features)
        result["diversity"] += distances(features.view(-1, IMAGES, features.shape[-1])).tolist()
    count = len(prompts) * IMAGES
    overall = float(distances(torch.cat(everything)[None]))
    return result | {"overall": overall, "rows": rows / count, "seconds": seconds / count}


def distances(features: torch.Tensor) -> torch.Tensor:
    """Returns the mean of 1 - cosine over all pairs in each group; features of unit length, [groups, n, d]."""
    n = features.shape[1]
    total = features.sum(1).square().sum(1) - n  # sum of the cosines of all pairs, each twice
    return 1 - total / (n * (n - 1))


def table(guide: Reward, others: list[Reward], budget: int, results: dict[str, Any]) -> list[str]:
    """Returns the lines of one table: means, paired differences to best-of-N and held-out ones to plain sampling."""
    prefix = f"{guide.name}/{budget}/"
    plain = results.get(f"{guide.name}/0/{PLAIN}")
    found = {key.removeprefix(prefix): result for key, result in results.items() if key.startswith(prefix)}
    if plain is None or BASELINE not in found:
        return []
    free = {key.split("/", 2)[2]: result for key, result in results.items() if key.startswith(f"{guide.name}/0/")}
    held_out = [reward.name for reward in others]
    lines = [
        "",
        f"## Guide {guide.name}, {budget} denoiser rows per image",
        "",
        f"{len(PROMPTS)} prompts x {IMAGES} images.",
        "",
        "| "
        + " | ".join(
            [
                *("sampler", guide.name, "- BestOfN", *(f"{key} - unguided" for key in held_out)),
                *("diversity", "overall", "rows", "seconds"),
            ]
        )
        + " |",
        "|---|" + "---:|" * (6 + len(held_out)),
    ]

    def scores(result: dict[str, Any], name: str) -> torch.Tensor:
        return torch.tensor(result["scores"][name])

    for name, result in (free | found).items():
        cells = [f"{float(scores(result, guide.name).mean()):.3f}"]
        same = name == BASELINE
        cells.append("" if same else interval(scores(result, guide.name), scores(found[BASELINE], guide.name)))
        cells += ["" if name == PLAIN else interval(scores(result, key), scores(plain, key)) for key in held_out]
        cells.append(f"{sum(result['diversity']) / len(result['diversity']):.3f}")
        slower = result["seconds"] / found[BASELINE]["seconds"]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {result['overall']:.3f} | {result['rows']:.0f} | {slower:.2f} |"
        )
    return lines


def report(results: dict[str, Any], guides: list[tuple[Reward, list[Reward]]]) -> str:
    """Returns the page."""
    lines = [
        "# Samplers at equal compute",
        "",
        f"The embedded model, T = {STEPS}, guidance scale 3, eta 1, same prompts and seeds; every count is the largest "
        "within the budget. Differences are paired by prompt, with 95 % intervals (Student's t). `CLIPScore-judge` is "
        "held out: a second CLIP, trained separately. Diversity is the mean of 1 - cosine of the CLIP embeddings over "
        "pairs of images of a prompt, `overall` over all pairs. Seconds are CPU seconds on one thread divided by "
        "those of BestOfN. Samplers with 25 rows do not scale with a budget and appear in each table. Made by "
        "`python -m benchmarks.samplers`.",
    ]
    for guide, others in guides:
        for budget in (200, 800):
            lines += table(guide, others, budget, results)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the missing cells and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guides", nargs="+", default=["Compressibility", "CLIPScore"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[200, 800])
    parser.add_argument("--only-report", action="store_true", help="write the page from the finished entries")
    parser.add_argument("--kept", type=Path, default=Path("build/samplers"), help="folder of finished entries")
    options = parser.parse_args()
    clip, judge, jpeg = CLIPScore(), CLIPScore("emoji-judge"), Compressibility()
    guides: list[tuple[Reward, list[Reward]]] = [(jpeg, [clip, judge]), (clip, [judge, jpeg])]
    diffusion = StableDiffusion("emoji", num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0)
    options.kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that CPU seconds are comparable
    if not options.only_report:
        for budget in (0, *options.budgets):
            for guide, others in guides:
                if guide.name not in options.guides:
                    continue
                for name, sampler in entries(guide, budget).items():
                    key = f"{guide.name}/{budget}/{name}"
                    path = options.kept / (key.replace("/", "--") + ".json")
                    if path.exists():
                        continue
                    value = PosteriorMean()
                    chosen = fit_budget(sampler(), budget, diffusion, value) if budget else sampler()
                    path.write_text(json.dumps({key: draw(diffusion, chosen, guide, others)}))
                    print(key, f"{json.loads(path.read_text())[key]['rows']:.0f} rows", flush=True)
    results: dict[str, Any] = {}
    for guide, _ in guides:
        for budget in (0, 200, 800):
            for name in entries(guide, budget):
                path = options.kept / (f"{guide.name}/{budget}/{name}".replace("/", "--") + ".json")
                if path.exists():
                    results |= json.loads(path.read_text())
    text = report(results, guides)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
