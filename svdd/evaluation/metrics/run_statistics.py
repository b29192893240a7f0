"""Statistics of the result rows of a run: rewards, divergence, selections and work."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from svdd.evaluation.metrics.reward_statistics import RewardStatistics

__all__ = ["RunStatistics"]

Rows = Sequence[Mapping[str, Any]]


class RunStatistics(nn.Module):
    """What the summary of a run states about its images, over all ranks.

    Args:
        higher_is_better: Of each reward by name, the guide first, whether the best images have the highest scores.
        selections: Names of the numbers in a row's `selection`.
        work: Names of the numbers in a row's `ledger`.
    """

    def __init__(self, higher_is_better: Mapping[str, bool], selections: Sequence[str], work: Sequence[str]) -> None:
        super().__init__()
        self.names = list(higher_is_better)  # a reward's name need not be a valid name of a submodule
        self.lower_is_better = [name for name, best_is_high in higher_is_better.items() if not best_is_high]
        self.rewards: Any = nn.ModuleList(RewardStatistics(best) for best in higher_is_better.values())
        self.path_kl = RewardStatistics()
        self.selections: Any = nn.ModuleDict({name: RewardStatistics() for name in selections})
        self.work: Any = nn.ModuleDict({name: SumMetric().set_dtype(torch.float64) for name in work})

    @torch.inference_mode(False)  # a metric that was filled in inference mode could not be used outside of it
    def update(self, rows: Rows) -> None:
        """Adds result rows."""
        for name, metric in zip(self.names, self.rewards, strict=True):
            metric.update(*_columns(rows, [row["rewards"][name] for row in rows]))
        self.path_kl.update(*_columns(rows, [row.get("path_kl_sample") for row in rows]))
        for name, metric in self.selections.items():
            metric.update(*_columns(rows, [row.get("selection", {}).get(name) for row in rows]))
        for name, metric in self.work.items():
            metric.update(torch.tensor([row["ledger"][name] for row in rows], dtype=torch.float64))

    def compute(self) -> dict[str, Any]:
        """Returns the summary's entries: `rewards`, `path_kl_bound`, those of the selections, `ledger`, rows per image.

        Statistics that are unknown for all images are left out.
        """
        found: dict[str, Any] = {"lower_is_better": self.lower_is_better} if self.lower_is_better else {}
        found["rewards"] = {}
        for name, metric in zip(self.names, self.rewards, strict=True):
            found["rewards"][name] = {key: value.item() for key, value in metric.compute().items()}
        divergence, images = self.path_kl.compute(), found["rewards"][self.names[0]]["count"]
        if divergence["count"]:
            found["path_kl_bound"] = {key: divergence[key].item() for key in ("mean", "standard_error")}
        for name, metric in self.selections.items():
            if (entry := metric.compute())["count"]:
                known = {key: entry[key].item() for key in ("mean", "min", "max")}
                found[name] = known if name == "alpha" else known["mean"]
        totals = {name: metric.compute().item() for name, metric in self.work.items()}
        found["ledger"] = {
            name: int(total) if total.is_integer() and not name.endswith("seconds") else total
            for name, total in ((name, round(total, 3)) for name, total in totals.items())
        }
        for name in ("denoiser_rows", "network_rows"):
            found[f"{name}_per_image"] = totals[name] / images if images else None
        return found

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forgets all rows."""
        for metric in (*self.rewards, self.path_kl, *self.selections.values(), *self.work.values()):
            metric.reset()


def _columns(rows: Rows, numbers: Sequence[float | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the numbers that are known, their prompts and their particles' weights, [n] each."""
    known = [
        (number, row["prompt_index"], row.get("particle_weight", 1.0))
        for number, row in zip(numbers, rows, strict=True)
        if number is not None
    ]
    found, prompts, weights = torch.tensor(known, dtype=torch.float64).view(-1, 3).unbind(1)
    return found, prompts.long(), weights
