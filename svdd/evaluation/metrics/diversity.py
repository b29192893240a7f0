"""How different pictures are from each other.

Sources: Friedman and Dieng, The Vendi Score: A Diversity Evaluation Metric for Machine Learning, 2022,
arXiv 2210.02410; the mean pairwise distance is the usual one of image features.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from svdd.evaluation.metrics.gathered import FeatureMetric

__all__ = ["Diversity", "pairwise_distance", "vendi_score"]


class Diversity(FeatureMetric):
    """Mean pairwise distance and Vendi score of image features, within each prompt and over all images.

    ``pairwise`` is the mean of 1 - cosine over all pairs; ``vendi`` is the effective number of different pictures, 1
    (all alike) to n. ``pairwise_within`` and ``vendi_within`` are their means over the prompts with several images,
    NaN where no prompt has two.

    Args:
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> diversity = Diversity()
        >>> diversity.update(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value.item(), 4) for name, value in diversity.compute().items()}
        {'pairwise': 1.0, 'vendi': 4.0, 'pairwise_within': 1.0, 'vendi_within': 2.0}
    """

    higher_is_better = True
    prompts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"features": torch.float32, "prompts": torch.int64}, **kwargs)

    def update(self, features: Tensor, prompts: Tensor) -> None:
        """Adds a batch.

        Args:
            features: float [n, d]; only their directions count.
            prompts: The prompt's index of each, int64 [n].

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.ndim != 2 or prompts.shape != features.shape[:1]:
            raise ValueError(
                f"expected features [n, d] and prompts [n], got {list(features.shape)} and {list(prompts.shape)}"
            )
        self.add("features", torch.nn.functional.normalize(features.detach().float(), dim=1))
        self.prompts.append(prompts.detach().to(features.device, torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """Returns the four numbers, float64 [], on the CPU."""
        names, measures = ("pairwise", "vendi"), (pairwise_distance, vendi_score)
        nothing = torch.tensor(math.nan, dtype=torch.float64)
        if not self.width:
            return dict.fromkeys((*names, *(f"{name}_within" for name in names)), nothing)
        features, prompts = self.rows("features"), dim_zero_cat(self.prompts).cpu()
        order = prompts.argsort(stable=True)
        features, sizes = features[order], prompts[order].unique_consecutive(return_counts=True)[1]
        several = [group for group in features.split(sizes.tolist()) if len(group) > 1]
        found = {name: measure(features) for name, measure in zip(names, measures, strict=True)}
        for name, measure in zip(names, measures, strict=True):
            within = torch.stack([measure(group) for group in several]).mean() if several else nothing
            found[f"{name}_within"] = within
        return found


def pairwise_distance(features: Tensor) -> Tensor:
    """Returns the mean of 1 - cosine over all pairs of rows of length 1, []; NaN for a single row.

    The sum of all cosines is the squared length of the sum of the rows, so no n x n matrix is needed.
    """
    n = len(features)
    if n < 2:
        return features.new_full((), math.nan)
    return 1 - (features.sum(0).square().sum() - n) / (n * (n - 1))


def vendi_score(features: Tensor) -> Tensor:
    """Returns exp of the entropy of the eigenvalues of K / n, where K holds the cosines of rows of length 1, [].

    K = F F^T has the eigenvalues of F^T F, which is the smaller of the two for many images.
    """
    n, d = features.shape
    gram = features @ features.T if n <= d else features.T @ features
    eigenvalues = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp()
