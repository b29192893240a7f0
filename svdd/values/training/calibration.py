"""How well a value predicts the reward, step by step, on new chains of the pretrained model."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.regression import explained_variance, pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities.distributed import gather_all_tensors

from svdd import UserError, check_bound, require_at_least
from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward, sparing_rewards
from svdd.rewards.columns import columns_of
from svdd.runs.bounds import check_images
from svdd.runs.config import plain
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.rows import Prompt
from svdd.samplers.base import require_noise
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.learned import require_single_score
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.training.allocation import allocate, expected_maximum, reliability, shrink
from svdd.values.training.rollouts import draw_rollouts

__all__ = [
    "FILES",
    "SCHEDULE",
    "Calibration",
    "measure",
    "plot",
    "require_chains",
    "schedule",
    "write",
    "write_schedule",
]

SCHEDULE = "candidates.json"
_MOST = 10**4  # candidates of a step
FILES = ("calibration.json", "calibration.csv", "calibration.png", SCHEDULE)

Table = list[dict[str, float]]


class Calibration(L.LightningModule):
    """Draws unguided chains, evaluates the value at every step, and compares it with the final rewards.

    Args:
        reward: The reward that the value predicts.
        diffusion: The pretrained model; by default the one that ships with svdd.
        value: The value to measure; by default `PosteriorMean`.
        images_per_prompt: Chains for each prompt, >= 1.
        seed: As in `svdd predict`, >= 0: the chains are those of its unguided images.
        candidates: Candidates per state, >= 2, from which the number of candidates of each step is fitted; 0 for none.
        average_candidates: The average of the fitted numbers over the steps, >= 2.
    """

    def __init__(
        self,
        reward: Reward,
        diffusion: Diffusion | None = None,
        value: Value | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
        candidates: int = 0,
        average_candidates: int = 20,
    ) -> None:
        super().__init__()
        require_at_least(1, images_per_prompt=images_per_prompt)
        require_at_least(2 if candidates else 0, candidates=candidates)
        require_at_least(2, average_candidates=average_candidates)
        for name, number in {"candidates": candidates, "average_candidates": average_candidates}.items():
            check_bound(name, number, _MOST, "each is a row of the network")
        check_images(1, images_per_prompt)
        require_at_least(0, seed=seed)
        self.reward, self.diffusion, self.value = reward, diffusion or AutoDiffusion(), value or PosteriorMean()
        require_noise(self.diffusion, "candidates", candidates)
        if self.diffusion.num_inference_steps < 2:
            raise UserError("num_inference_steps=1 has no step between noise and image to evaluate at; use at least 2")
        if self.value.keep is not None:
            raise UserError(
                f"calibrate measures one value: give one part of {type(self.value).__name__} as model.value"
            )
        require_single_score("svdd calibrate", reward)
        self.value.bind(reward, self.diffusion)
        self.columns = columns_of(reward)
        reward.load()
        self.images_per_prompt, self.seed = images_per_prompt, seed
        self.candidates, self.average_candidates = candidates, average_candidates
        self.table: Table = []
        self.fit_schedule: Callable[[], Table] | None = None  # of the candidates per step, once they are drawn
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Runs `images_per_prompt` chains for each prompt of the batch."""
        jobs = [(prompt, k) for prompt in batch for k in range(self.images_per_prompt)]
        seeds = [seed for prompt in batch for seed in prompt.image_seeds(self.seed, self.images_per_prompt)]
        steps = range(self.diffusion.num_inference_steps)
        prompts, preview = [prompt._replace(text=self.columns.text(prompt)) for prompt, _ in jobs], self.value.preview
        read, end = draw_rollouts(self.diffusion, prompts, seeds, steps, self._read, preview)
        values, mean, std = read.unbind(2)
        keys = torch.tensor([[prompt.index, k] for prompt, k in jobs])
        columns = keys, values[:, 1:], end.scores(self.reward)[:, None].cpu(), *([mean, std] if self.candidates else [])
        self._seen.append(torch.cat([column.double() for column in columns], 1))

    def _read(self, state: State) -> Tensor:
        """Returns each row's value, and mean and standard deviation of its candidates' values, [n, 3]."""
        unknown = torch.full((len(state.x), 3), torch.nan, dtype=torch.float64)
        if state.i:
            unknown[:, 0] = self.value(state).double()
        if self.candidates:  # with noise of their own, so that the chain stays that of an unguided image
            context = replace(state.context, generators=state.context.choosers)
            v = self.value(replace(state, context=context).propose(self.candidates)).double().view(-1, self.candidates)
            unknown[:, 1], unknown[:, 2] = v.mean(1), v.std(1)
        return unknown

    def on_test_epoch_end(self) -> None:
        """Gathers the chains of all processes, some of which may have none, orders them by prompt, and measures."""
        steps = self.diffusion.num_inference_steps
        none = torch.empty(0, 2 + (3 if self.candidates else 1) * steps, dtype=torch.float64)
        own, self._seen = torch.cat([none, *self._seen]).to(self.device), []
        chains = torch.cat(gather_all_tensors(own) if self.trainer.world_size > 1 else [own]).cpu()
        chains = chains[(chains[:, 0] * self.images_per_prompt + chains[:, 1]).argsort()]
        prompts, own = chains[:, 0].long(), chains[:, 2 : 2 + steps]  # at the last step the reward
        self.table = measure(own[:, :-1], own[:, -1], prompts)
        if self.candidates:
            mean, std = chains[:, 2 + steps :].chunk(2, 1)
            found = reliability(own, mean, std, self.candidates, own[:, -1], prompts)
            self.fit_schedule = partial(schedule, std.mean(0), *found, self.average_candidates)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Calibration":
        """Moves and converts model and value, as `to` and Lightning do; rewards keep their precision."""
        return super()._apply(sparing_rewards(self, fn), recurse)


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


def schedule(spread: Tensor, slopes: Tensor, errors: Tensor, average: int) -> Table:
    """Returns, for each step, spread, reliability, its standard error, fitted candidates and their gain.

    `allocation` explains them. A spread below 1e-9 of the largest is rounding, of a step without noise.
    """
    spread = torch.where(spread > 1e-9 * spread.max(), spread, 0.0)
    gains = shrink(spread * slopes, spread * errors).tolist()
    counts = allocate(gains, average * len(gains))
    return [
        {
            "step": i,
            "spread": float(spread[i]),
            "reliability": float(slopes[i]),
            "standard_error": float(errors[i]),
            "candidates": count,
            "gain": gain * expected_maximum(count),
        }
        for i, (gain, count) in enumerate(zip(gains, counts, strict=True))
    ]


def write_schedule(folder: Path, table: Table) -> str:
    """Writes `candidates.json`, a configuration with the fitted numbers of candidates; returns a text table."""
    counts = [row["candidates"] for row in table]
    text = json.dumps({"model": {"sampler": {"init_args": {"num_candidates": counts}}}})
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SCHEDULE, f"{text}\n".encode())
    return _text(table)


def _text(table: Table) -> str:
    def cell(number: float) -> str:
        return str(number) if isinstance(number, int) else f"{number:.4f}" if math.isfinite(number) else "-"

    lines = ([*table[0]], *(map(cell, row.values()) for row in table))
    return "\n".join("".join(f"{text:>20}" for text in line) for line in lines)


def _within(numbers: Tensor, prompts: Tensor) -> Tensor:
    """Returns each number's deviation from the mean of its prompt."""
    counts = torch.bincount(prompts).clamp(min=1)
    means = torch.zeros(len(counts), dtype=numbers.dtype).scatter_add_(0, prompts, numbers) / counts
    return numbers - means[prompts]


def write(folder: Path, table: Table, about: dict[str, Any], title: str) -> tuple[str, bool]:
    """Writes `calibration.csv`, `calibration.png`, and last, as the sign that all are whole, `calibration.json`.

    Returns a text table, and whether there is a plot: it needs matplotlib.
    """
    steps = plain(table, finite=True)
    cells = ([*table[0]], *(["" if number is None else str(number) for number in row.values()] for row in steps))
    lines = "".join(f"{','.join(line)}\r\n" for line in cells)
    record = json.dumps({**about, "steps": steps}, indent=2)
    summary, numbers, picture = (folder / name for name in FILES[:3])
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (summary, picture):
            path.unlink(missing_ok=True)
        write_atomically(numbers, lines.encode())
        plotted = plot(picture, {about["value"]: table}, title)
        write_atomically(summary, f"{record}\n".encode())
    return _text(table), plotted


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
