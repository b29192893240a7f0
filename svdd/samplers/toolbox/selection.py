"""Which rows of a group survive: pure functions from log-weights to indices."""

import math

import torch
from torch import Tensor

__all__ = ["choice_kl", "draw", "effective_sample_size", "probabilities", "top"]


def top(log_w: Tensor, k: int = 1) -> Tensor:
    """Returns the k best rows of every group, best first; the earlier row wins a tie.

    Args:
        log_w: Log-weights, float [groups, rows].
        k: Survivors per group, 1 .. rows.

    Returns:
        Index within the group, int64 [groups, k].

    Raises:
        ValueError: If k is out of range or a weight is NaN.
    """
    _check(log_w)
    if not 1 <= k <= log_w.shape[1]:
        raise ValueError(f"k must lie in 1 .. {log_w.shape[1]}, the rows of a group, got {k}")
    return log_w.argsort(dim=1, descending=True, stable=True)[:, :k]


def draw(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Draws k independent rows of every group in proportion to exp(log_w), by inversion.

    Args:
        log_w: Log-weights, float [groups, rows], as in `probabilities`.
        uniforms: Numbers in [0, 1), float [groups, k].

    Returns:
        Index within the group, int64 [groups, k].
    """
    cumulative = probabilities(log_w).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # the last entry is 1 exactly, above every uniform number
    return torch.searchsorted(cumulative, uniforms.double(), right=True)


def probabilities(log_w: Tensor) -> Tensor:
    """Returns exp(log_w), normalised in every group, float64 [groups, rows]; -inf means weight zero.

    Raises:
        ValueError: If a weight is NaN or +inf, or all weights of a group are zero.
    """
    _check(log_w)
    if torch.isposinf(log_w).any() or torch.isneginf(log_w).all(dim=1).any():
        raise ValueError("log-weights must be below +inf, and finite for at least one row of every group")
    return log_w.double().softmax(1)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Returns (sum w)^2 / sum w^2 of every group, 1 .. rows, float64 [groups] (Kong, Liu and Wong, 1994)."""
    return 1 / probabilities(log_w).square().sum(1)


def choice_kl(values: Tensor, alpha: float) -> Tensor:
    """Bounds the divergence that selecting one of n independent rows at temperature alpha adds, in nats, [groups].

    The best of n: log n - (n - 1) / n (Beirami et al., 2024, arXiv 2401.01879). Drawn with probabilities p:
    log n - H(p), the divergence of the joint law of rows and choice.
    """
    groups, n = values.shape
    if alpha == 0:
        return values.new_full((groups,), math.log(n) - (n - 1) / n, dtype=torch.float64)
    return math.log(n) - torch.special.entr(probabilities(values.double() / alpha)).sum(1)


def _check(log_w: Tensor) -> None:
    if log_w.ndim != 2 or log_w.shape[1] == 0:
        raise ValueError(f"log-weights must have shape [groups, rows] with at least one row, got {list(log_w.shape)}")
    if log_w.isnan().any():
        raise ValueError(f"{int(log_w.isnan().sum())} of {log_w.numel()} log-weights are NaN")
