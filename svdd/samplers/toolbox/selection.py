"""Which rows of a group survive, and how often: pure functions from log-weights to indices within the group, int64.

Resamplers map `(log_w [g, k], uniforms [g, k])` to `index [g, k]`. Each is unbiased: the expected number of copies of
particle j is k W_j. Systematic and SSP resampling also round every k W_j to floor or ceil.

Sources: Douc, Cappe and Moulines, Comparison of Resampling Schemes for Particle Filtering, 2005, arXiv cs/0507025;
Gerber, Chopin and Whiteley, Negative Association, Ordering and Convergence of Resampling Methods, 2017, arXiv
1707.01845 (SSP: Srinivasan sampling process).
"""

import math

import torch
from torch import Tensor

__all__ = ["RESAMPLERS", "choice_kl", "draw", "effective_sample_size", "probabilities", "tempered", "top"]

_ROUNDING = 1e-9  # largest error of softmax and cumsum at an integer


def top(log_w: Tensor, k: int = 1) -> Tensor:
    """Returns the k best rows of every group of log_w [groups, rows], best first; the earlier row wins a tie.

    Raises:
        ValueError: If k is not in 1 .. rows or a weight is NaN.
    """
    _check(log_w)
    if not 1 <= k <= log_w.shape[1]:
        raise ValueError(f"k must lie in 1 .. {log_w.shape[1]}, the rows of a group, got {k}")
    return log_w.argsort(dim=1, descending=True, stable=True)[:, :k]


def draw(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Draws k independent rows of every group by `probabilities` of log_w, with uniforms [groups, k] in [0, 1)."""
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


def tempered(values: Tensor, alpha: float | Tensor) -> Tensor:
    """Returns the log-weights values / alpha, float64; -inf, for a row without a value, at infinite alpha too."""
    return (values.double() / alpha).masked_fill(values.isneginf(), -math.inf)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Returns (sum w)^2 / sum w^2 of every group, 1 .. rows, float64 [groups] (Kong, Liu and Wong, 1994)."""
    return 1 / probabilities(log_w).square().sum(1)


def choice_kl(values: Tensor, alpha: float | Tensor) -> Tensor:
    """Bounds the divergence that selecting one of n independent rows at temperature alpha adds, in nats, [groups].

    The best of n: log n - (n - 1) / n (Beirami et al., 2024, arXiv 2401.01879). Drawn with probabilities p:
    log n - H(p), the divergence of the joint law of rows and choice. alpha is a number or [groups, 1].
    Both also bound a choice after screening, where the other rows have the value -inf: no rule for one of n rows
    diverges more than the best of n.
    """
    groups, n = values.shape
    if not isinstance(alpha, Tensor) and alpha == 0:
        return values.new_full((groups,), math.log(n) - (n - 1) / n, dtype=torch.float64)
    return math.log(n) - torch.special.entr(probabilities(tempered(values, alpha))).sum(1)


def _stratified(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function at one uniform number in each of k equal strata."""
    steps = _rounded(_expected(log_w).cumsum(1))
    steps[:, -1] = steps.shape[1]  # above every point
    below_all = torch.nextafter(steps[0, -1], torch.zeros_like(steps[0, -1]))  # k - 1 + u may round up to k
    return _first_above(steps, (_slots(steps) + uniforms.double()).clamp(max=below_all))


def _systematic(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function at k equally spaced points; only the first uniform number is used."""
    return _stratified(log_w, uniforms[:, :1])


def _residual(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Keeps floor(k W) copies of each particle and draws the rest from the remaining weights."""
    expected = _expected(log_w)
    rest = expected - expected.floor()
    certain, slots = expected.floor().cumsum(1), _slots(expected)
    nothing_left = rest.sum(1, keepdim=True) == 0  # then the draws are not used, and any weights will do
    drawn = draw(torch.where(nothing_left, torch.ones_like(rest), rest).log(), uniforms)
    return torch.where(slots < certain[:, -1:], _first_above(certain, slots), drawn)


def _ssp(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Rounds fractional copies pair by pair, at random and without bias, until each is 0 or 1.

    For a pair of fractions a and b: if a + b < 1, they become 0 and a + b, else 1 and a + b - 1, in random order. The
    sum and both expectations are preserved. Neighbours are paired in rounds, as in a knockout tournament: O(k) in all.
    """
    expected = _expected(log_w)
    copies, k = expected.floor(), log_w.shape[1]
    fractions, holders = expected - copies, _slots(expected).long().expand_as(expected)  # those still open
    used = 0
    while (pairs := fractions.shape[1] // 2) > 0:
        (a, i), (b, j) = ((fractions[:, first : 2 * pairs : 2], holders[:, first : 2 * pairs : 2]) for first in (0, 1))
        total = a + b
        full = total >= 1 - _ROUNDING  # the last pair sums to 1 but for rounding, which must not decide
        share = torch.where(full, (1 - b) / (2 - total).clamp(min=_ROUNDING), b / total.clamp(min=_ROUNDING))
        second_stays = uniforms[:, used : used + pairs] < share  # then its fraction stays open and the first is rounded
        copies = copies.scatter_add(1, torch.where(second_stays, i, j), full.to(copies))
        fractions = torch.cat([torch.where(full, (total - 1).clamp(min=0), total), fractions[:, 2 * pairs :]], 1)
        holders = torch.cat([torch.where(second_stays, j, i), holders[:, 2 * pairs :]], 1)
        used += pairs
    copies = copies.scatter_add(1, holders, k - copies.sum(1, keepdim=True))  # the last one is 0 or 1 but for rounding
    return _first_above(copies.cumsum(1), _slots(copies))


RESAMPLERS = dict(multinomial=draw, stratified=_stratified, systematic=_systematic, residual=_residual, ssp=_ssp)


def _expected(log_w: Tensor) -> Tensor:
    return _rounded(probabilities(log_w) * log_w.shape[1])  # copies k W


def _rounded(numbers: Tensor) -> Tensor:
    """Rounds the numbers that are integers up to floating-point error."""
    whole = numbers.round()
    return torch.where((numbers - whole).abs() < _ROUNDING, whole, numbers)


def _first_above(steps: Tensor, points: Tensor) -> Tensor:
    return torch.searchsorted(steps, points.expand_as(steps).contiguous(), right=True)


def _slots(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device, dtype=like.dtype)[None]


def _check(log_w: Tensor) -> None:
    if log_w.ndim != 2 or log_w.shape[1] == 0:
        raise ValueError(f"log-weights must have shape [groups, rows] with at least one row, got {list(log_w.shape)}")
    if log_w.isnan().any():
        raise ValueError(f"{int(log_w.isnan().sum())} of {log_w.numel()} log-weights are NaN")
