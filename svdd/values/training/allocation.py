"""Where candidates gain most: their number at each step, fitted to chains of the pretrained model.

A step that takes the best of M candidates by a value raises the expected final reward by

    gain(M) = reliability * spread * E[largest of M standard normal numbers]

if the candidates' values are normal. `spread` is the standard deviation of the value among the candidates of one
parent; `reliability` is the slope of the final reward on the value among them: 1 for an unbiased estimate of the final
reward's mean, 0 for noise. The gain is concave in M, so that giving each next candidate to the step where it gains most
maximises the sum. That sum ignores that earlier selections change the states, and so the spread, of later steps.

The reference of the slope is the chain's own final reward. Its own child is one of the parent's possible candidates, so
over chains the product of the child's deviation from its siblings and the final reward has the covariance of value and
final reward as its mean: unbiased, and no candidate's chain has to be finished. One chain costs T M rows.

Few chains determine the slopes badly. The gains are therefore pulled towards their mean over the steps, the more the
larger their standard errors, as an empirical Bayes estimate (Efron and Morris, Stein's estimation rule and its
competitors, 1973): without evidence all steps have the same number of candidates.
"""

import heapq
from functools import cache

import torch
from torch import Tensor

from svdd import UserError

__all__ = ["allocate", "expected_maximum", "reliability", "shrink"]


@cache
def expected_maximum(n: int) -> float:
    """Returns the expected largest of n standard normal numbers, by quadrature of 1 - F^n - F(-z)^n over z > 0."""
    z = torch.linspace(0, 10, 2001, dtype=torch.float64)
    below, above = torch.special.ndtr(z), torch.special.ndtr(-z)
    return float(torch.trapezoid(1 - below**n - above**n, z))


def allocate(gains: list[float], total: int) -> list[int]:
    """Returns counts >= 1 that sum to `total` and maximise the sum of gains[i] * expected_maximum(counts[i]).

    Steps without a gain have one candidate. If no step has a gain, UserError.
    """
    if not any(gain > 0 for gain in gains):
        raise UserError("the value does not tell the candidates of a parent apart at any step: draw more chains")
    counts = [1] * len(gains)
    queue = [(-gain * expected_maximum(2), i) for i, gain in enumerate(gains) if gain > 0]
    heapq.heapify(queue)
    for _ in range(total - len(gains)):
        i = queue[0][1]
        counts[i] += 1
        more = expected_maximum(counts[i] + 1) - expected_maximum(counts[i])
        heapq.heapreplace(queue, (-gains[i] * more, i))
    return counts


def shrink(gains: Tensor, errors: Tensor) -> Tensor:
    """Pulls gains with standard errors, float64 [T] each, towards their mean; returns them >= 0.

    Each moves by the share error^2 / (between + error^2) of its distance from the mean, where `between`, at least 0, is
    the mean of the squared distances less that of error^2. Steps with neither gain nor error have no noise and stay 0.
    """
    known = (gains != 0) | (errors > 0)
    centre = gains[known].mean()
    between = ((gains[known] - centre).square() - errors[known].square()).mean().clamp(min=0)
    error = errors.square() / (between + errors.square()).clamp(min=torch.finfo(gains.dtype).tiny)
    return torch.where(known, gains + error * (centre - gains), 0.0).clamp(min=0)


def reliability(
    own: Tensor, mean: Tensor, std: Tensor, m: int, rewards: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the slope of the final reward on the value among the candidates of one parent, and its standard error.

    Both are float64 [T]; entry i belongs to the step from i to i + 1. Slopes are pooled over a fifth of the chain,
    weighted by the variance of the value. Rewards and means are compared within prompts, which leaves less noise.
    Standard errors are those of the jackknife over chains. From few chains, the variance of the value that `own` shows
    may be near 0 or negative; it counts as at least a tenth of that which `std` shows.

    Args:
        own: The value of each chain's own state i + 1, at the end its reward, float64 [n, T].
        mean: Mean value of m other children of its state i, float64 [n, T].
        std: Their standard deviation, float64 [n, T].
        m: Number of those children.
        rewards: Final rewards, float64 [n].
        prompts: Each chain's prompt, int64 [n].
    """
    deviation, error = own - mean, std.square() / m  # of the means
    y, z = _from_others(rewards[:, None], prompts), _from_others(mean, prompts)
    slope = (y * z).mean(0) / z.square().mean(0).clamp(min=torch.finfo(z.dtype).tiny)  # of a baseline, against noise
    covariance, variance = deviation * (y - slope * z) - slope * error, deviation.square() - error
    n, steps = covariance.shape
    half = max(1, steps // 10)
    slopes, errors = [], []
    for i in range(steps):
        near = slice(max(0, i - half), i + half + 1)
        above, below = (part[:, near].sum(1) for part in (covariance, variance))
        least = max(float(std[:, near].square().sum()) / 10, 1e-300)
        slopes.append(above.sum() / below.sum().clamp(min=least))
        without = (above.sum() - above) / (below.sum() - below).clamp(min=least)
        errors.append(without.std(correction=0) * (n - 1) ** 0.5)
    return torch.stack(slopes), torch.stack(errors)


def _from_others(numbers: Tensor, prompts: Tensor) -> Tensor:
    """Returns each chain's deviation from the mean of the prompt's other chains, or of all others, [n, ...]."""
    counts = torch.bincount(prompts)
    if int(counts[prompts].min()) < 2:
        prompts, counts = torch.zeros_like(prompts), torch.tensor([len(prompts)])
    sums = torch.zeros(len(counts), *numbers.shape[1:], dtype=numbers.dtype).index_add(0, prompts, numbers)
    n = counts[prompts].view(-1, *[1] * (numbers.ndim - 1))
    return numbers - (sums[prompts] - numbers) / (n - 1)
