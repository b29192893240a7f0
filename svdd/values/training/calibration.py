"""How well a value predicts the reward, step by step, on new chains of the pretrained model."""

import io
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.regression import explained_variance, pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities.distributed import gather_all_tensors

from svdd import UserError, require_at_least
from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.runs.bounds import check_images
from svdd.runs.config import plain
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.rows import Prompt
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.training.rollouts import draw_rollouts

__all__ = ["FILES", "Calibration", "measure", "plot", "require_chains", "write"]

FILES = ("calibration.json", "calibration.csv", "calibration.png")

Table = list[dict[str, float]]


class Calibration(L.LightningModule):
    """Draws unguided chains, evaluates the value at every step, and compares it with the final rewards.

    Args:
        reward: The reward that the value predicts.
        diffusion: The pretrained model; by default the one that ships with svdd.
        value: The value to measure; by default `PosteriorMean`.
        images_per_prompt: Chains for each prompt, >= 1.
        seed: As in `svdd predict`, >= 0: the chains are those of its unguided images.
    """

    def __init__(
        self,
        reward: Reward,
        diffusion: Diffusion | None = None,
        value: Value | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, images_per_prompt=images_per_prompt)
        check_images(1, images_per_prompt)
        require_at_least(0, seed=seed)
        self.reward, self.diffusion, self.value = reward, diffusion or AutoDiffusion(), value or PosteriorMean()
        if self.diffusion.num_inference_steps < 2:
            raise UserError("num_inference_steps=1 has no step between noise and image to evaluate at; use at least 2")
        self.value.bind(reward, self.diffusion)
        reward.load()
        self.images_per_prompt, self.seed = images_per_prompt, seed
        self.table: Table = []
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Runs `images_per_prompt` chains for each prompt of the batch."""
        jobs = [(prompt, k) for prompt in batch for k in range(self.images_per_prompt)]
        seeds = [seed for prompt in batch for seed in prompt.image_seeds(self.seed, self.images_per_prompt)]
        steps = range(1, self.diffusion.num_inference_steps)
        values, end = draw_rollouts(self.diffusion, [prompt for prompt, _ in jobs], seeds, steps, self.value)
        keys = torch.tensor([[prompt.index, k] for prompt, k in jobs])
        columns = keys, values, end.scores(self.reward)[:, None].cpu()
        self._seen.append(torch.cat([column.double() for column in columns], 1))

    def on_test_epoch_end(self) -> None:
        """Gathers the chains of all processes, some of which may have none, orders them by prompt, and measures."""
        none = torch.empty(0, 2 + self.diffusion.num_inference_steps, dtype=torch.float64)
        own, self._seen = torch.cat([none, *self._seen]).to(self.device), []
        chains = torch.cat(gather_all_tensors(own) if self.trainer.world_size > 1 else [own]).cpu()
        chains = chains[(chains[:, 0] * self.images_per_prompt + chains[:, 1]).argsort()]
        self.table = measure(chains[:, 2:-1], chains[:, -1], chains[:, 0].long())


def require_chains(num_chains: int) -> None:
    """Raises UserError for fewer than three chains; two always lie on a line."""
    if num_chains < 3:
        raise UserError(f"needs at least 3 chains, better hundreds, got {num_chains}; increase images_per_prompt")


def measure(values: Tensor, rewards: Tensor, prompts: Tensor) -> Table:
    """Compares values at the steps 1 .. T - 1, float64 [n, T - 1], with final rewards, float64 [n]: one row per step.

    `spearman_within` correlates deviations from the mean of each chain's prompt, int64 [n] (NaN with one chain each),
    `bias` is the mean of value - reward, `explained_variance` is 1 - var(reward - value) / var(reward). UserError if
    there are fewer than three chains, or all rewards are equal.
    """
    require_chains(len(rewards))
    if not rewards.var() > 0:
        raise UserError(f"the rewards of {len(rewards)} chains do not differ: draw more, or use another reward")
    several, within = bool((torch.bincount(prompts) > 1).any()), _within(rewards, prompts)
    return [
        {
            "step": i,
            "spearman": float(spearman_corrcoef(v, rewards)),
            "spearman_within": float(spearman_corrcoef(_within(v, prompts), within)) if several else torch.nan,
            "pearson": float(pearson_corrcoef(v, rewards)),
            "bias": float((v - rewards).mean()),
            "rmse": float((v - rewards).square().mean().sqrt()),
            "explained_variance": float(torch.as_tensor(explained_variance(v, rewards))),
        }
        for i, v in enumerate(values.unbind(1), start=1)
    ]


def _within(numbers: Tensor, prompts: Tensor) -> Tensor:
    """Returns each number's deviation from the mean of its prompt."""
    counts = torch.bincount(prompts).clamp(min=1)
    means = torch.zeros(len(counts), dtype=numbers.dtype).scatter_add_(0, prompts, numbers) / counts
    return numbers - means[prompts]


def write(folder: Path, table: Table, about: dict[str, Any], title: str) -> tuple[str, bool]:
    """Writes `calibration.csv`, `calibration.png`, and last, as the sign that all are whole, `calibration.json`.

    Returns a text table, and whether there is a plot: it needs matplotlib.
    """
    lines = "".join(",".join(map(str, cells)) + "\r\n" for cells in ([*table[0]], *(row.values() for row in table)))
    record = json.dumps({**about, "steps": plain(table, finite=True)}, indent=2)
    summary, numbers, picture = (folder / name for name in FILES)
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (summary, picture):
            path.unlink(missing_ok=True)
        write_atomically(numbers, lines.encode())
        plotted = plot(picture, {about["value"]: table}, title)
        write_atomically(summary, f"{record}\n".encode())
    cells = ([f"{row['step']:.0f}", *(f"{number:.4f}" for number in [*row.values()][1:])] for row in table)
    return "\n".join("".join(f"{cell:>20}" for cell in line) for line in ([*table[0]], *cells)), plotted


def plot(path: Path, tables: dict[str, Table], title: str) -> bool:
    """Plots rank correlation and explained variance over the steps, one line per value; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, table in tables.items():
        columns = {key: [row[key] for row in table] for key in table[0]}
        (line,) = left.plot(columns["step"], columns["spearman"], label=name)
        right.plot(columns["step"], columns["explained_variance"], color=line.get_color())
        within = columns["spearman_within"]
        if not math.isnan(within[0]):
            left.plot(columns["step"], within, "--", color=line.get_color(), label=f"{name}, within prompts")
    for axes, label in ((left, "Spearman correlation"), (right, "explained variance")):
        axes.set(xlabel="step i (1: noise)", ylabel=label, ylim=(max(-1.0, min(0.0, axes.get_ylim()[0])), 1.02))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())
    return True
