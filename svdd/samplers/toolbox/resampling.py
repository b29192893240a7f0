"""Resampling: which particles of a population survive, and how often.

Pure functions `(log_w [g, k], uniforms [g, k]) -> index [g, k]` over g groups. Each is unbiased: the expected number of
copies of particle j is k W_j. Systematic and SSP resampling also round every k W_j to floor or ceil.

Sources: Douc, Cappe and Moulines, Comparison of Resampling Schemes for Particle Filtering, 2005, arXiv cs/0507025;
Gerber, Chopin and Whiteley, Negative Association, Ordering and Convergence of Resampling Methods, 2017, arXiv
1707.01845 (SSP: Srinivasan sampling process).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from svdd.samplers.toolbox.selection import draw, probabilities

__all__ = ["RESAMPLERS", "residual", "ssp", "stratified", "systematic"]

_ROUNDING = 1e-9  # largest error of softmax and cumsum at an integer


def stratified(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function at one uniform number in each of k equal strata."""
    steps = _rounded(_expected(log_w).cumsum(1))
    steps[:, -1] = steps.shape[1]  # above every point
    below_all = torch.nextafter(steps[0, -1], torch.zeros_like(steps[0, -1]))  # k - 1 + u may round up to k
    return _first_above(steps, (_slots(steps) + uniforms.double()).clamp(max=below_all))


def systematic(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function at k equally spaced points; only the first uniform number is used."""
    return stratified(log_w, uniforms[:, :1])


def residual(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Keeps floor(k W) copies of each particle and draws the rest from the remaining weights."""
    expected = _expected(log_w)
    rest = expected - expected.floor()
    certain, slots = expected.floor().cumsum(1), _slots(expected)
    nothing_left = rest.sum(1, keepdim=True) == 0  # then the draws are not used, and any weights will do
    drawn = draw(torch.where(nothing_left, torch.ones_like(rest), rest).log(), uniforms)
    return torch.where(slots < certain[:, -1:], _first_above(certain, slots), drawn)


def ssp(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Rounds fractional copies pair by pair, at random and without bias, until each is 0 or 1.

    For a pair of fractions a and b: if a + b < 1, they become 0 and a + b, else 1 and a + b - 1, in random order. The
    sum and both expectations are preserved.
    """
    expected = _expected(log_w)
    copies, fraction = expected.floor(), expected - expected.floor()
    groups = torch.arange(len(copies), device=log_w.device)
    holder = torch.zeros_like(groups)  # the particle whose fraction is open
    open_part = fraction[:, 0]
    for j in range(1, copies.shape[1]):
        b = fraction[:, j]
        total = open_part + b
        full = total >= 1
        share = torch.where(full, (1 - b) / (2 - total).clamp(min=_ROUNDING), b / total.clamp(min=_ROUNDING))
        newcomer_stays = uniforms[:, j - 1] < share  # then its fraction stays open and the holder's is rounded
        copies[groups, torch.where(newcomer_stays, holder, j)] += full.to(copies)
        holder = torch.where(newcomer_stays, j, holder)
        open_part = torch.where(full, total - 1, total)
    copies[groups, holder] += copies.shape[1] - copies.sum(1)  # the last open fraction is 0 or 1 but for rounding
    return _first_above(copies.cumsum(1), _slots(copies))


RESAMPLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multinomial": draw,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def _expected(log_w: Tensor) -> Tensor:
    """Returns the expected copies k W, float64 [g, k]."""
    return _rounded(probabilities(log_w) * log_w.shape[1])


def _rounded(numbers: Tensor) -> Tensor:
    """Rounds what is an integer up to floating-point error."""
    whole = numbers.round()
    return torch.where((numbers - whole).abs() < _ROUNDING, whole, numbers)


def _first_above(steps: Tensor, points: Tensor) -> Tensor:
    """Returns the index of the first of the rising steps above each point, int64 [g, k]."""
    return torch.searchsorted(steps, points.expand_as(steps).contiguous(), right=True)


def _slots(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device, dtype=like.dtype)[None]
