"""Metrics that keep every number they are given, and gather them from all ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["FeatureMetric", "GatheredMetric"]


class GatheredMetric(Metric):
    """Concatenates the named states over all ranks; a rank without images joins with empty tensors.

    Args:
        dtypes: The dtype of each state, a list of tensors [n].
        kwargs: Passed on to :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, dtypes: dict[str, torch.dtype], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtypes = dtypes
        for name in dtypes:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def kept_as(self, name: str) -> torch.dtype:
        """Returns the dtype of a state on this device; Apple's MPS has no float64."""
        dtype = self._dtypes[name]
        return torch.float32 if dtype == torch.float64 and self.device.type == "mps" else dtype

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all ranks."""
        for name in self._dtypes:
            if not len(getattr(self, name)):
                getattr(self, name).append(torch.zeros(0, dtype=self.kept_as(name), device=self.device))
        super().sync(*args, **kwargs)


class FeatureMetric(GatheredMetric):
    """Keeps features flat, because a rank without images does not know their width.

    Args:
        dtypes: The dtype of each state; features are float32.
        kwargs: Passed on to :class:`torchmetrics.Metric`.
    """

    width: Tensor

    def __init__(self, dtypes: dict[str, torch.dtype], **kwargs: Any) -> None:
        super().__init__(dtypes, **kwargs)
        self.add_state("width", default=torch.tensor(0), dist_reduce_fx="max")

    def add(self, name: str, features: Tensor) -> None:
        """Adds features, float [n, d], to a state."""
        getattr(self, name).append(features.detach().float().flatten())
        self.width = self.width.new_tensor(features.shape[1])

    def rows(self, name: str) -> Tensor:
        """Returns the features of a state, float64 [n, d] on the CPU: some devices have no float64."""
        parts = getattr(self, name)
        flat = dim_zero_cat(parts).cpu().double() if len(parts) else torch.zeros(0)
        return flat.view(-1, max(1, int(self.width)))
