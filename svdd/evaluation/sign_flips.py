"""Whether paired differences are larger than chance: an exact sign-flip test, guarded against skewed differences.

Sources: Fisher, The Design of Experiments, 1935, section 21 (flips of all signs); Hemerik and Goeman, Exact testing
with random permutations, 2018, arXiv 1411.7565 (a subgroup of the flips is as exact); Hall, On the removal of skewness
by transformation, 1992.
"""

import math
from collections.abc import Sequence

from svdd.evaluation.metrics.intervals import t_probability

__all__ = ["p_value"]

_BITS = 14  # at most 2^14 flips: a p-value as small as 1e-4, and all flips of up to 14 differences


def p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of the mean, at least 2^(1 - n) for n up to 14 differences.

    It is the larger of two. The first is the share of sign flips whose sum is at least as far from 0, which is exact if
    each difference is symmetric around 0. That of Student's t, corrected for skewness, guards against differences of
    mean 0 that are not symmetric: of these, most have the same sign.
    """
    return max(_sign_flips(differences), _skewed_t(differences))


def _sign_flips(differences: Sequence[float]) -> float:
    """Returns the share of flips with |sum| >= |sum of the differences|, for a group of flips that is fixed by n.

    Each difference has a code; flip g changes its sign if the code and g have an odd number of bits in common. A
    Walsh-Hadamard transform returns the sums of all flips.
    """
    import torch  # takes seconds, and only p-values need it

    count, bits = len(differences), min(len(differences), _BITS)
    codes = 2 ** torch.arange(count)
    if count > bits:
        codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(0))
    given = torch.tensor(differences, dtype=torch.float64)
    sums = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, codes, given)
    for k in range(bits):
        kept, flipped = sums.view(-1, 2, 2**k).unbind(1)
        sums = torch.stack([kept + flipped, kept - flipped], 1).flatten()
    rounding = 1e-9 * float(given.abs().sum())  # equal sums may differ in their last bits
    return float((sums.abs() >= abs(float(sums[0])) - rounding).double().mean())


def _skewed_t(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of Student's t, reduced by Hall's transformation if the longer tail points to 0.

    Here a < 0 is the skewness in the direction of the mean, divided by the root of n, and t becomes
    ((1 + a t / 3)^3 - 1) / a + a / 6, without the division, which would lose all digits at a near 0.
    """
    count, mean = len(differences), math.fsum(differences) / len(differences)
    rests = [math.copysign(1.0, mean) * (difference - mean) for difference in differences]
    variance = math.fsum(rest**2 for rest in rests) / count
    if count < 3 or variance == 0:
        return 0.0  # the skewness is unknown
    t = abs(mean) * math.sqrt((count - 1) / variance)
    a = math.fsum(rest**3 for rest in rests) / count / variance**1.5 * math.sqrt(count - 1) / (count - 2)
    if a < 0:
        t = max(0.0, t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6)
    return t_probability(t, count - 1)
