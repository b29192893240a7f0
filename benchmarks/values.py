"""Learned value against posterior mean on the embedded model: correlation by step, reward and wall time.

Value and sampler come from configs/svdd_mc_compressibility.yaml, for benchmarks/values.md and
docs/images/calibration.png, or with `--reward clipscore` from configs/svdd_mc_clipscore.yaml, for
benchmarks/values_clipscore.md. `--pretrained` selects other weights.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.paired import PROMPTS, interval
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.pretrained import load_value
from svdd.values.training.calibration import measure, plot

STEPS, AT_ONCE = 25, 4
HERE = Path(__file__).parent
REWARDS: dict[str, tuple[Reward, Reward]] = {  # the guide, and one that is held out
    "compressibility": (Compressibility(), CLIPScore()),
    "clipscore": (CLIPScore(), CLIPScore("emoji-judge")),
}


@torch.no_grad()
def correlations(diffusion: StableDiffusion, values: dict[str, Value], images: int) -> dict[str, Any]:
    """Evaluates all values on the same new chains and returns a calibration table for each."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in values}
    rewards = []
    for k, prompt in enumerate(PROMPTS):
        state = State.start(diffusion, [prompt] * images, range(5000 + k * images, 5000 + (k + 1) * images))
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in values}
        while not state.done:
            if state.i > 0:
                for name, value in values.items():
                    columns[name].append(value(state))
            state = state.propose()
        rewards.append(state.scores(next(iter(values.values())).reward))
        for name, parts in columns.items():
            seen[name].append(torch.stack(parts, 1))
    prompts = torch.arange(len(PROMPTS)).repeat_interleave(images)
    end = torch.cat(rewards).double()
    return {name: measure(torch.cat(parts).double(), end, prompts) for name, parts in seen.items()}


@torch.no_grad()
def alternate(
    diffusion: StableDiffusion,
    samplers: dict[str, tuple[Sampler, Value]],
    held_out: Reward,
    images: int,
    prompts: Any = PROMPTS,
) -> dict[str, dict[str, Any]]:
    """Runs all samplers in turn; returns guide and held-out scores [prompts, images], rows, seconds per image."""
    runs: dict[str, dict[str, Any]] = {
        name: {"guide": [], "held out": [], "rows": 0.0, "seconds": 0.0, "wall": 0.0} for name in samplers
    }
    count = len(prompts) * images
    for start in range(0, len(prompts), AT_ONCE // images):
        texts = [prompt for prompt in prompts[start : start + AT_ONCE // images] for _ in range(images)]
        for name, (sampler, value) in samplers.items():
            run = runs[name]
            begin = Start(diffusion, texts, [1000 * start + k for k in range(len(texts))])
            began, began_wall = time.process_time(), time.perf_counter()
            final = sampler(begin, value)
            pictures = final.images
            run["seconds"] += (time.process_time() - began) / count
            run["wall"] += (time.perf_counter() - began_wall) / count
            run["rows"] += final.context.ledger.denoiser_rows / count
            run["guide"].append(value.reward.score(pictures, texts).view(-1, images))
            run["held out"].append(held_out.score(pictures, texts).view(-1, images))
    return {name: run | {key: torch.cat(run[key]) for key in ("guide", "held out")} for name, run in runs.items()}


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", choices=REWARDS, default="compressibility")
    parser.add_argument("--pretrained", help="weights that `svdd fit` wrote; default: those of the configuration")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--best-of", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--output", type=Path, help="the page")
    options = parser.parse_args()
    images, first = options.images, options.reward == "compressibility"
    reward, held_out = REWARDS[options.reward]
    page = options.output or HERE / ("values.md" if first else f"values_{options.reward}.md")
    picture = HERE.parent / "docs" / "images" / ("calibration.png" if first else f"calibration_{options.reward}.png")
    config = yaml.safe_load((HERE.parent / "configs" / f"svdd_mc_{options.reward}.yaml").read_text())["model"]
    search = config["sampler"]["init_args"]
    m = search["num_candidates"]
    diffusion = StableDiffusion("emoji", STEPS, guidance_scale=3.0, eta=1.0)
    learned, mean = load_value(options.pretrained or config["value"]["init_args"]["pretrained"]), PosteriorMean()
    kind = type(learned).__name__
    for value in (learned, mean):
        value.bind(reward, diffusion)
        value.eval()

    tables = correlations(diffusion, {kind: learned, "PosteriorMean": mean}, images=4)
    plot(
        picture,
        tables,
        f"{reward.name} on the embedded model, {4 * len(PROMPTS)} fresh chains",
    )

    torch.set_num_threads(1)
    samplers: dict[str, tuple[Sampler, Value]] = {
        "Unguided": (Unguided(), mean),
        **{f"BestOfN, N = {n}": (BestOfN(n), mean) for n in options.best_of},
        f"SVDD, M = {m}, {kind}": (SVDD(**search), learned),
        f"SVDD, M = {m}, {kind}, every step": (SVDD(m), learned),
    }
    if "guide_stop" not in search:
        del samplers[f"SVDD, M = {m}, {kind}, every step"]
    runs = alternate(diffusion, samplers, held_out, images)
    plain, guided = runs["Unguided"], runs[f"SVDD, M = {m}, {kind}"]
    rivals = {name: run for name, run in runs.items() if name.startswith("BestOfN")}
    rival = min(rivals, key=lambda name: abs(rivals[name]["seconds"] - guided["seconds"]))
    both: dict[str, tuple[Sampler, Value]] = {"mean": (SVDD(m), mean), "learned": (SVDD(m), learned)}
    timed = alternate(diffusion, both, held_out, 1, PROMPTS[: 2 * AT_ONCE])
    wall, cpu = (timed["learned"][key] / timed["mean"][key] for key in ("wall", "seconds"))
    stopped = ""
    if "guide_stop" in search:
        stopped = (
            f" SVDD guides until {search['guide_stop']:g} of the chain; `every step` includes the last one, whose {m} "
            "candidates are decoded and scored by the reward itself."
        )
    rows = 1 + (m if learned.most_rows else 1) * (STEPS - 1)
    lines = [
        "# Learned value and posterior mean",
        "",
        f"{reward.name} on the embedded model, T = {STEPS}, guidance scale 3, eta 1, {len(PROMPTS)} prompts that the "
        f"value was not trained on. Made by `python -m benchmarks.values --reward {options.reward}`.",
        "",
        "## Correlation with the final reward, by step",
        "",
        f"{4 * len(PROMPTS)} new chains, 4 per prompt. `within` is the rank correlation of deviations from the "
        "prompt's mean, which a sampler can use.",
        "",
        "| step | learned | posterior mean | learned, within | posterior mean, within | learned, explained variance "
        "| posterior mean, explained variance |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for a, b in zip(tables[kind], tables["PosteriorMean"], strict=True):
        keys = ("spearman", "spearman_within", "explained_variance")
        cells = [f"{table[key]:.3f}" for key in keys for table in (a, b)]
        lines.append(f"| {a['step']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Reward at equal time",
        "",
        f"{len(PROMPTS)} prompts x {images} images, paired by prompt, 95 % intervals. CPU seconds on one thread, "
        "measured alternating in one run.",
        "",
        f"| sampler | {reward.name} | - unguided | {held_out.name} - unguided (held out) | denoiser rows "
        "| CPU seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        differences = ["", ""] if run is plain else [interval(run[key], plain[key]) for key in ("guide", "held out")]
        lines.append(
            f"| {name} | {float(run['guide'].mean()):.3f} | {' | '.join(differences)} | {run['rows']:.0f} "
            f"| {run['seconds']:.2f} |"
        )
    lines += [
        "",
        f"{rival} costs {rivals[rival]['seconds'] / guided['seconds']:.2f} times the CPU seconds of SVDD with the "
        f"learned value. SVDD - {rival}: {interval(guided['guide'], rivals[rival]['guide'])}." + stopped,
        "",
        "## Time",
        "",
        f"SVDD, M = {m}, every step, learned value / posterior mean, alternating on {2 * AT_ONCE} images: {wall:.3f} "
        f"of the wall time, {cpu:.3f} of the CPU time, one thread. Denoiser rows: {rows} / {1 + m * (STEPS - 1)}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    page.write_text(text)


if __name__ == "__main__":
    main()
