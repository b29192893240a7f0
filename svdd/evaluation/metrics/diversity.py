"""How different pictures are from each other.

Source: Friedman and Dieng, The Vendi Score: A Diversity Evaluation Metric for Machine Learning, 2022, arXiv 2210.02410.
"""

import math
from typing import Any

import torch
from torch import Tensor

from svdd.evaluation.metrics.gathered import GatheredMetric

__all__ = ["Diversity"]


class Diversity(GatheredMetric):
    """Mean pairwise distance and Vendi score of image features, over all images and within each prompt.

    ``pairwise`` is the mean of 1 - cosine over all pairs; ``vendi`` is the effective number of different pictures, 1
    (all alike) to n. Particles count by their weights: a pair by their product, the Vendi score of a picture by its
    share. ``pairwise_within`` and ``vendi_within`` are the means over the prompts with several images.
    All are NaN without images; ``pairwise`` needs two, the means a prompt with two.

    Examples:
        >>> import torch
        >>> diversity = Diversity()
        >>> diversity.update(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value.item(), 4) for name, value in diversity.compute().items()}
        {'pairwise': 1.0, 'vendi': 4.0, 'pairwise_within': 1.0, 'vendi_within': 2.0}
    """

    def __init__(self, **kwargs: Any) -> None:
        empty = {"features": torch.zeros(0, 0), "prompts": torch.zeros(0, dtype=torch.int64)}
        super().__init__(empty | {"weights": torch.zeros(0, dtype=torch.float64)}, **kwargs)

    def update(self, features: Tensor, prompts: Tensor, weights: Tensor | None = None) -> None:
        """Adds features, float [n, d], of which only directions count, with the index of each prompt, int64 [n].

        `weights`, real [n], are the particles' shares in their images; by default every row is an image.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.ndim != 2 or prompts.shape != features.shape[:1]:
            shapes = f"{list(features.shape)} and {list(prompts.shape)}"
            raise ValueError(f"expected features [n, d] and prompts [n], got {shapes}")
        self.add("features", torch.nn.functional.normalize(features.detach().float(), dim=1))
        self.add("prompts", prompts)
        self.add("weights", torch.ones(len(prompts)) if weights is None else weights)

    def compute(self) -> dict[str, Tensor]:
        """Returns the four numbers, float64 [], on the CPU."""
        features, prompts, weights = self.rows("features").double(), self.rows("prompts"), self.rows("weights").double()
        order = prompts.argsort(stable=True)
        features, weights = features[order], weights[order]
        sizes = prompts[order].unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(features.split(sizes), weights.split(sizes), strict=True)
        several = [(group, shares) for group, shares in parts if len(group) > 1]
        found = {}
        for suffix, groups in (("", [(features, weights)] if len(features) else []), ("_within", several)):
            for name, measure in (("pairwise", _pairwise_distance), ("vendi", _vendi_score)):
                found[name + suffix] = features.new_tensor([float(measure(*group)) for group in groups]).mean()
        return found


def _pairwise_distance(features: Tensor, weights: Tensor) -> Tensor:
    """Returns the mean of 1 - cosine over all pairs of rows of length 1; cosines sum to |sum of the rows|^2."""
    alone, total = weights.square().sum(), weights.sum()
    pairs = total.square() - alone
    if not pairs > 0:
        return features.new_full((), math.nan)
    return 1 - ((features * weights[:, None]).sum(0).square().sum() - alone) / pairs


def _vendi_score(features: Tensor, weights: Tensor) -> Tensor:
    """Returns exp of the entropy of the eigenvalues of K_jk sqrt(p_j p_k), with cosines K of rows of length 1.

    With F scaled by sqrt(p), F F^T has the non-zero eigenvalues of F^T F, the smaller matrix for many images.
    """
    n, d = features.shape
    features = features * weights.sqrt()[:, None]
    gram = features @ features.T if n <= d else features.T @ features
    eigenvalues = torch.linalg.eigvalsh(gram / weights.sum()).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp()
