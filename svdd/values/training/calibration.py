"""How well a value foretells the reward, step by step, on fresh chains of the pretrained model."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.regression import explained_variance, pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities.distributed import gather_all_tensors

from svdd import UserError
from svdd.runs.files import explained, write_atomically
from svdd.runs.prompts import Prompt
from svdd.state.state import State

__all__ = ["FILES", "ValueCalibration", "check_counts", "measure", "plot", "read_config", "write"]

FILES = ("calibration.json", "calibration.csv", "calibration.png")

_FEWEST_CHAINS = 3  # two always lie on a line


class ValueCalibration(L.LightningModule):
    """Draws unguided chains in `test_step`, asks the value at every step, and measures it against the rewards."""

    diffusion: Any
    value: Any
    reward: Any
    images_per_prompt: int
    seed: int
    calibration: list[dict[str, float]]

    def on_test_epoch_start(self) -> None:
        """Forgets an earlier calibration."""
        self._seen: list[Tensor] = []
        self.calibration = []

    @torch.no_grad()
    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Runs `images_per_prompt` chains for each prompt of the batch, with the seeds of `predict_step`."""
        jobs = [(prompt, k) for prompt in batch for k in range(self.images_per_prompt)]
        seeds = [
            (self.seed + prompt.index * self.images_per_prompt + k if prompt.seed is None else prompt.seed + k) % 2**63
            for prompt, k in jobs
        ]
        texts, negatives = [prompt.text for prompt, _ in jobs], [prompt.negative_prompt for prompt, _ in jobs]
        state, columns = State.start(self.diffusion, texts, seeds, 1, negatives), []
        while not state.done:
            if state.i > 0:
                columns.append(self.value(state))
            state = state.propose()
        columns.append(state.scores(self.reward))
        key = torch.tensor([[prompt.index, k] for prompt, k in jobs], device=self.device)
        self._seen.append(torch.cat([key.double(), torch.stack(columns, 1).double()], 1))

    def on_test_epoch_end(self) -> None:
        """Gathers all processes' chains, of which some may have drawn none, in the order of prompts, and measures."""
        none = torch.empty(0, 2 + self.diffusion.num_inference_steps, dtype=torch.float64, device=self.device)
        own = torch.cat([none, *self._seen])
        everything = torch.cat(gather_all_tensors(own) if self.trainer.world_size > 1 else [own]).cpu()
        everything = everything[(everything[:, 0] * self.images_per_prompt + everything[:, 1]).argsort()]
        self.calibration = measure(everything[:, 2:-1], everything[:, -1], everything[:, 0].long())


def check_counts(num_inference_steps: int, num_chains: int) -> None:
    """Refuses what no correlation can be measured on.

    Args:
        num_inference_steps: T; the value is asked at the steps 1 .. T - 1.
        num_chains: Prompts times images per prompt.

    Raises:
        UserError: If there is no step between noise and image, or fewer than three chains.
    """
    if num_inference_steps < 2:
        raise UserError(
            f"num_inference_steps={num_inference_steps} has no step between noise and image to ask the value at; "
            "use at least 2"
        )
    if num_chains < _FEWEST_CHAINS:
        raise UserError(
            f"a calibration needs at least {_FEWEST_CHAINS} chains, better hundreds, got {num_chains}; "
            "give more prompts or a larger images_per_prompt"
        )


def measure(values: Tensor, rewards: Tensor, prompts: Tensor) -> list[dict[str, float]]:
    """Returns one row per step.

    Args:
        values: Estimates at the steps 1 .. T - 1, float64 [n, T - 1].
        rewards: What the chains ended in, float64 [n].
        prompts: Index of each chain's prompt, int64 [n].

    Returns:
        For each step: `spearman` and `pearson` correlation of value and reward, `spearman_within` (of their deviations
        from the prompt's mean: what a sampler can choose by; NaN with one chain per prompt), `bias` (mean of value -
        reward), `rmse`, and `explained_variance` (1 - var(reward - value) / var(reward)).

    Raises:
        UserError: If there are too few steps or chains, or all rewards are the same.
    """
    check_counts(values.shape[1] + 1, len(rewards))
    if not rewards.var() > 0:
        raise UserError(
            f"the rewards of {len(rewards)} chains do not differ, so there is nothing to foretell; "
            "draw more chains or use another reward"
        )
    several = bool((torch.bincount(prompts) > 1).any())
    table = []
    for i, v in enumerate(values.unbind(1), start=1):
        row: dict[str, Any] = {
            "step": i,
            "spearman": spearman_corrcoef(v, rewards),
            "spearman_within": spearman_corrcoef(_within(v, prompts), _within(rewards, prompts))
            if several
            else torch.tensor(torch.nan),
            "pearson": pearson_corrcoef(v, rewards),
            "bias": (v - rewards).mean(),
            "rmse": (v - rewards).square().mean().sqrt(),
            "explained_variance": explained_variance(v, rewards),
        }
        table.append({name: number if name == "step" else float(number) for name, number in row.items()})
    return table


def _within(numbers: Tensor, prompts: Tensor) -> Tensor:
    """Returns the deviation of each number from the mean of its prompt's."""
    counts = torch.bincount(prompts).clamp(min=1)
    means = torch.zeros(len(counts), dtype=numbers.dtype).scatter_add_(0, prompts, numbers) / counts
    return numbers - means[prompts]


def write(folder: Path, table: list[dict[str, float]], about: dict[str, Any]) -> str:
    """Writes `calibration.json` and `calibration.csv`, removes an earlier plot, and returns the table as text.

    Args:
        folder: The run folder.
        table: What `measure` returned.
        about: What was measured, for the JSON file.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    plain = [{name: None if number != number else number for name, number in row.items()} for row in table]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILES[0], json.dumps({**about, "steps": plain}, indent=2).encode() + b"\n")
        write_atomically(folder / FILES[1], buffer.getvalue().encode())
        (folder / FILES[2]).unlink(missing_ok=True)
    names = list(table[0])
    lines = ["".join(f"{name:>20}" for name in names)]
    lines += [
        "".join(f"{row[name]:>20.0f}" if name == "step" else f"{row[name]:>20.4f}" for name in names) for row in table
    ]
    return "\n".join(lines)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the configuration that `write` recorded in a JSON file; of any other file an empty one."""
    try:
        config = json.loads(path.read_bytes())["config"]
    except (ValueError, KeyError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def plot(path: Path, tables: dict[str, list[dict[str, float]]], title: str) -> bool:
    """Draws rank correlation and explained variance over the steps; one line per table.

    Args:
        path: The PNG file.
        tables: What `measure` returned, by the name of the value.
        title: Above the picture.

    Returns:
        Whether matplotlib is there to draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, key, label in (
        (axes[0], "spearman", "Spearman correlation"),
        (axes[1], "explained_variance", "explained variance"),
    ):
        for name, table in tables.items():
            (line,) = ax.plot([row["step"] for row in table], [row[key] for row in table], label=name)
            within = [row["spearman_within"] for row in table]
            if key == "spearman" and within[0] == within[0]:
                ax.plot(
                    [row["step"] for row in table],
                    within,
                    "--",
                    color=line.get_color(),
                    label=f"{name}, within prompts",
                )
        ax.set_xlabel("step i (1: noise)")
        ax.set_ylabel(label)
        ax.set_ylim(max(-1.0, min(0.0, ax.get_ylim()[0])), 1.02)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return True
