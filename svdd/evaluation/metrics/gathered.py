"""The base of metrics that keep every row they are given."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["GatheredMetric"]


class GatheredMetric(Metric):
    """Gathers the rows of all ranks, also where a rank has none.

    Args:
        empty: An empty tensor for each state, of its dtype and number of dimensions.
        kwargs: Passed on to :class:`torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(self, empty: dict[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty = empty
        for name in empty:
            self.add_state(name, default=[], dist_reduce_fx=None)

    def add(self, name: str, rows: Tensor) -> None:
        """Copies rows to a state and merges equal sizes, as a binary counter carries: about log2(n) tensors stay."""
        parts, rows = getattr(self, name), self._on_device(name, rows)
        while parts and len(parts[-1]) <= len(rows):
            last = parts.pop()
            rows = torch.cat([last, rows]) if len(last) else rows
        parts.append(rows)

    def rows(self, name: str) -> Tensor:
        """Returns all rows of a state, on the CPU: some devices have no float64."""
        parts = [part for part in getattr(self, name) if len(part)]
        return torch.cat(parts).cpu() if parts else self._empty[name]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all ranks, each as one tensor per rank."""
        for name, empty in self._empty.items():
            parts = getattr(self, name)
            setattr(self, name, [torch.cat(parts) if parts else self._on_device(name, empty)])
        super().sync(*args, **kwargs)

    def _on_device(self, name: str, rows: Tensor) -> Tensor:
        dtype = self._empty[name].dtype
        dtype = torch.float32 if dtype == torch.float64 and self.device.type == "mps" else dtype  # MPS has no float64
        return rows.detach().to(self.device, dtype, copy=True)
