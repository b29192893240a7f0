"""Previews and lookahead: SVDD with each value on the embedded model, guided by CLIPScore.

Writes benchmarks/previews.md. `Lookahead` has fewer candidates, for equal denoiser rows.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.paired import PROMPTS, interval
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.samplers.svdd import SVDD
from svdd.state.start import Start
from svdd.values.base import Value
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean

STEPS, AT_ONCE, CANDIDATES = 25, 8, 8


def entries() -> dict[str, tuple[Value, int]]:
    """Returns each value with its number of candidates."""

    def matching(k: int) -> int:
        per_candidate = sum(1 + min(k, STEPS - 1 - i) for i in range(1, STEPS))
        return max(1, round(CANDIDATES * (STEPS - 1) / per_candidate))

    return {
        "PosteriorMean": (PosteriorMean(), CANDIDATES),
        "PosteriorMean, decoder tiny": (PosteriorMean(decoder="tiny"), CANDIDATES),
        "PosteriorMean, guidance_scale 1": (PosteriorMean(guidance_scale=1.0), CANDIDATES),
        "PosteriorMean, both": (PosteriorMean("tiny", 1.0), CANDIDATES),
        "Lookahead, 1 step": (Lookahead(1), matching(1)),
        "Lookahead, 3 steps": (Lookahead(3), matching(3)),
    }


@torch.no_grad()
def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    prompts = PROMPTS[: options.prompts]
    diffusion, reward, judge = (
        StableDiffusion("emoji", STEPS, guidance_scale=3.0),
        CLIPScore(),
        CLIPScore("emoji-judge"),
    )
    torch.set_num_threads(1)
    table = entries()
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in table}
    held_out: dict[str, list[torch.Tensor]] = {name: [] for name in table}
    seconds, rows, network = (dict.fromkeys(table, 0.0) for _ in range(3))
    for value, _ in table.values():
        value.bind(reward, diffusion)
    for start in range(0, len(prompts), AT_ONCE):  # values alternate, so that background load affects all alike
        part = list(prompts[start : start + AT_ONCE])
        for name, (value, candidates) in table.items():
            begin = Start(diffusion, part, range(start, start + len(part)))
            began = time.process_time()
            final = SVDD(candidates)(begin, value)
            pictures = final.images
            seconds[name] += time.process_time() - began
            rows[name] += final.context.ledger.denoiser_rows
            network[name] += final.context.ledger.network_rows
            scores[name].append(reward.score(pictures, part)[:, None])
            held_out[name].append(judge.score(pictures, part)[:, None])
    base, n = "PosteriorMean", len(prompts)
    lines = [
        "# Previews and lookahead",
        "",
        f"SVDD with CLIPScore on the embedded model, T = {STEPS}, guidance scale 3, eta 1, {n} prompts, same seeds. "
        "Differences to PosteriorMean are paired by prompt, with 95 % intervals. CPU seconds on "
        "one thread are relative to PosteriorMean's, measured alternating in one run. Made by "
        "`python -m benchmarks.previews`.",
        "",
        "| value | M | CLIPScore | - PosteriorMean | held-out judge - | denoiser rows | network rows | CPU seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, (_, candidates) in table.items():
        own, judged = torch.cat(scores[name]), torch.cat(held_out[name])
        difference = interval(own, torch.cat(scores[base])) if name != base else ""
        other = interval(judged, torch.cat(held_out[base])) if name != base else ""
        lines.append(
            f"| {name} | {candidates} | {float(own.mean()):.3f} | {difference} | {other} | {rows[name] / n:.0f} "
            f"| {network[name] / n:.0f} | {seconds[name] / seconds[base]:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
