"""How well previews rank the candidates of a parent: rank correlation with the exact posterior-mean reward.

Writes benchmarks/preview_ranks.md. At every fourth step of an unguided chain, each particle draws candidates; every
preview and the exact prediction of the same candidates are decoded and scored, by two rewards.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paired import PROMPTS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.preview import Preview
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.state.start import Start
from svdd.state.state import State

STEPS, EVERY, CANDIDATES = 25, 4, 16
MODELS = {"emoji": (StableDiffusion, 3.0), "emoji-flow": (StableDiffusion3, 2.0)}
PREVIEWS = {
    "exact": None,
    "guidance_scale 1": Preview(guidance_scale=1.0),
    "reuse_guidance": Preview(reuse_guidance=True),
    **{f"feature_depth {d}": Preview(feature_depth=d) for d in (1, 2, 3)},
    **{f"feature_depth {d}, reuse_guidance": Preview(reuse_guidance=True, feature_depth=d) for d in (1, 2, 3)},
}


Found = tuple[dict[tuple[str, str, str], list[tuple[int, Tensor]]], dict[str, float]]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Returns the rank correlation in each row, with equal ranks for ties, [g, k] to [g]; NaN for a constant row."""
    ranks = [(x[:, :, None] > x[:, None]).sum(2) + (x[:, :, None] == x[:, None]).sum(2) / 2 for x in (a, b)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))


def preview(diffusion: LatentDiffusion, parents: State, children: State, kind: Preview | None) -> Tensor:
    """Returns the children's x0."""
    conditioning = parents.context.conditioning
    if kind is None:
        return diffusion.denoise(children.x, children.i, conditioning, children.row).x0
    recorded = diffusion.record(parents.x, parents.i, conditioning, parents.row, kind)
    reused = {
        name: part.repeat_interleave(CANDIDATES, 0) for name, part in recorded.items() if name not in ("x0", "mean")
    }
    return diffusion.preview(children.x, children.i, conditioning, children.row, kind, reused)


def measure(name: str, prompts: list[str], device: str) -> Iterator[Found]:
    """Yields after each step what has been measured so far: correlations, [prompts], by reward, preview and decoder."""
    kind, scale = MODELS[name]
    diffusion = kind(name, STEPS, guidance_scale=scale).to(device)
    decoders = {"full": diffusion.decode, "tiny": diffusion.load_decoder("tiny").eval().to(device)}
    rewards = {"JPEG": Compressibility(), "CLIPScore": CLIPScore().to(device)}
    rows = {label: diffusion.preview_rows(part or Preview(), STEPS // 2) for label, part in PREVIEWS.items()}
    state, found = Start(diffusion, prompts, range(len(prompts)))(1), defaultdict(list)
    for i in range(STEPS - 1):
        if i % EVERY:
            state = state.propose(1)
            continue
        children, scores = state.propose(CANDIDATES), {}
        for label, part in PREVIEWS.items():
            x0 = preview(diffusion, state, children, part)
            for decoder, decode in decoders.items():
                images = decode(x0)
                for reward, scorer in rewards.items():
                    score = scorer.score(images, children.prompts).view(len(prompts), CANDIDATES)
                    scores[reward, label, decoder] = score.double().cpu()
        for key, score in scores.items():
            found[key].append((3 * i // (STEPS - 1), spearman(score, scores[key[0], "exact", "full"])))
        state = children.select(torch.zeros(len(prompts), 1, dtype=torch.int64))
        yield found, rows


def table(name: str, found: dict[tuple[str, str, str], list[tuple[int, Tensor]]], rows: dict[str, float]) -> list[str]:
    """Returns the lines of a model's table."""
    head = "| preview | network rows | JPEG, full decoder | JPEG, tiny | CLIPScore, full decoder | CLIPScore, tiny |"
    lines = ["", f"## {name}", "", head, "|---|---:|---|---|---|---|"]
    for label in PREVIEWS:
        cells = []
        for key in ((reward, label, decoder) for reward in ("JPEG", "CLIPScore") for decoder in ("full", "tiny")):
            thirds = [[part for third, part in found[key] if third == k] for k in range(3)]
            means = [f"{float(torch.cat(parts).nanmean()):.2f}" for parts in thirds if parts]
            cells.append("" if key[1:] == ("exact", "full") else " / ".join(means))
        lines.append(f"| {label} | {rows[label]:.2f} | {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Ranks of previews",
        "",
        f"Spearman's rank correlation with the exact posterior-mean reward among {CANDIDATES} candidates of a parent: "
        f"mean over {options.prompts} prompts and the early / middle / late thirds of T = {STEPS} steps, at every "
        "fourth step of an unguided chain, eta 1. Guidance scale 3 (`emoji`) and 2 (`emoji-flow`). Network rows are "
        "those of one candidate's preview, by counted operations. Made by `python -m benchmarks.preview_ranks`.",
    ]
    for name in options.models:
        own: list[str] = []
        for found, rows in measure(name, list(PROMPTS[: options.prompts]), options.device):
            own = table(name, found, rows)
            options.output.write_text("\n".join(lines + own) + "\n")
        lines += own
    print(options.output.read_text())


if __name__ == "__main__":
    main()
