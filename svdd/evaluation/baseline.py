"""Comparison of a run with an unguided run of the same prompts, for the guide and for held-out rewards.

A sampler that maximises one reward too far finds pictures that only this reward likes: a held-out reward falls while
the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from svdd import UserError
from svdd.evaluation.metrics.intervals import standard_error, t_interval, t_probability, t_quantile
from svdd.evaluation.pairing import incomparable, pair, require_pairs, same_prompts
from svdd.evaluation.sides import Positions, Side, read_side
from svdd.evaluation.sign_flips import p_value

__all__ = [
    "UNPAIRED",
    "against",
    "compare",
    "difference_words",
    "independent",
    "over_optimised",
    "paired",
    "prompt_means",
    "verdict",
]

UNPAIRED = "draw the baseline with the same settings, or compare without pairs by --evaluation.unpaired true"
_FALSE_ALARMS = 0.05  # of all held-out rewards together, two-sided

Comparison = Mapping[str, Mapping[str, float]]


def against(run: Path, baseline: Path, unpaired: bool = False) -> dict[str, dict[str, float]]:
    """Returns the difference of each reward that both runs have for all images: see `compare`.

    The weights of particles apply within their image. The baseline may have more images than the run.

    Args:
        run: The run; it may lack prompts that failed.
        baseline: The run with which it is compared.
        unpaired: Compare all images of both runs without pairs.

    Raises:
        UserError: If the runs cannot be paired (see `require_pairs`), or share no reward.
    """
    ours, plain = read_side(run), read_side(baseline)
    if not unpaired:
        require_pairs([ours, plain], UNPAIRED)
    found = compare(plain, [ours], None if unpaired else pair([plain, ours]), with_p_values=True)[0]
    if not found:
        raise UserError(f"{run} and {baseline} measured no reward in common; add it to the baseline's eval_rewards")
    return found


def compare(
    plain: Side, others: Sequence[Side], positions: Sequence[Positions] | None, with_p_values: bool = False
) -> list[dict[str, dict[str, float]]]:
    """Returns the differences of each reward, for each of several runs compared with one.

    The images of a prompt are averaged, and prompts count equally: `paired` of runs with the same prompts, else
    `independent`. If runs have unequal numbers of images of a prompt, only the first ones of the longer run are tested,
    so that both means vary alike.

    Args:
        plain: The run with which the others are compared.
        others: The others; the intervals of all hold together with 95 %.
        positions: The paired images of `plain` and of each other one; None compares all images without pairs.
        with_p_values: Whether p-values are computed, which needs torch.
    """
    everything = [np.arange(len(side.keys)) for side in (plain, *others)]
    chosen, found = everything if positions is None else positions, []
    for other, places in zip(others, chosen[1:], strict=True):
        entries = {}
        texts = other.texts[places], plain.texts[chosen[0]]
        together, even = same_prompts(*texts), _even(*texts) if with_p_values else ()
        comparable = [name for name in other.rewards if name in plain.rewards]
        for name in sorted({*comparable} - incomparable(plain, other), key=comparable.index):
            scores = other.rewards[name][places], plain.rewards[name][chosen[0]]
            if any(np.isnan(each).any() for each in scores):
                continue
            ours, theirs = map(prompt_means, texts, scores)
            if not together:
                entries[name] = independent(ours.tolist(), theirs.tolist(), len(others))
                continue
            tested = None
            if even:
                one, two = (prompt_means(t[at], s[at]) for t, s, at in zip(texts, scores, even, strict=True))
                tested = (one - two).tolist()
            entries[name] = paired((ours - theirs).tolist(), tested, len(others), with_p_values)
        found.append(entries)
    return found


def prompt_means(texts: npt.NDArray[np.bytes_], scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the mean score of each distinct prompt, in an order that depends on the prompts alone."""
    _, group = np.unique(texts, return_inverse=True)
    return np.bincount(group, scores) / np.bincount(group)


def _even(*texts: npt.NDArray[np.bytes_]) -> list[Positions]:
    """Returns positions of as many images of each prompt on either side as both have, the first ones."""
    known = reduce(np.intersect1d, texts)
    least = np.min([np.unique(each[np.isin(each, known)], return_counts=True)[1] for each in texts], axis=0)
    found = []
    for each in texts:
        names, group = np.unique(each, return_inverse=True)
        order = np.argsort(group, kind="stable")
        rank = np.arange(len(order)) - np.searchsorted(group[order], np.arange(len(names)))[group[order]]
        most = np.zeros(len(names), dtype=int)
        most[np.isin(names, known)] = least
        found.append(order[rank < most[group[order]]])
    return found


def paired(
    differences: Sequence[float],
    tested: Sequence[float] | None = None,
    comparisons: int = 1,
    with_p_value: bool = True,
) -> dict[str, float]:
    """Returns the mean of the prompts' differences, its standard error, its interval by Student's t and a p-value.

    The intervals of all `comparisons` together hold with 95 % (Bonferroni: each has the level 1 - 0.05 / comparisons).
    The p-value is that of `tested`, by default the same differences, and is not corrected; without `with_p_value` it is
    NaN. With one prompt, error and interval are NaN.
    """
    count, mean = len(differences), math.fsum(differences) / len(differences)
    error = standard_error([[(difference, 1.0)] for difference in differences])
    low, high = t_interval(mean, error, count, 1 - 0.05 / comparisons)
    p = p_value(differences if tested is None else tested) if with_p_value else math.nan
    ends = {"ci95_low": low, "ci95_high": high, "p_value": p}
    return {"difference": mean, "standard_error": error, **ends, "prompts": count}


def independent(ours: Sequence[float], theirs: Sequence[float], comparisons: int = 1) -> dict[str, float]:
    """Returns what `paired` does, by Welch's t test of two independent sets of prompts' means.

    Source: Welch, The generalization of Student's problem when several different population variances are involved,
    1947. Degrees of freedom are rounded down.
    """
    errors = [standard_error([[(score, 1.0)] for score in side]) for side in (ours, theirs)]
    difference, error = fmean(ours) - fmean(theirs), math.hypot(*errors)
    low = high = p = math.nan
    if error == error:  # both sides have two prompts
        parts = [each**4 / (len(side) - 1) for each, side in zip(errors, (ours, theirs), strict=True)]
        freedom = int(error**4 / sum(parts) + 1e-9) if sum(parts) else len(ours) + len(theirs) - 2
        half = t_quantile(1 - 0.05 / comparisons, freedom) * error
        low, high = difference - half, difference + half
        p = t_probability(difference / error, freedom) if error else float(difference == 0)
    ends = {"ci95_low": low, "ci95_high": high, "p_value": p}
    return {"difference": difference, "standard_error": error, **ends, "prompts": min(len(ours), len(theirs))}


def over_optimised(comparison: Comparison, guide: str, higher_is_better: Mapping[str, bool]) -> list[str] | None:
    """Returns the held-out rewards that became significantly worse while the guide rose significantly.

    The guide rose if its p-value is at most 0.05. The p-values of held-out rewards are Bonferroni-corrected, so that
    noise gives a false alarm in at most 2.5 % of the runs, if it is as likely to raise a difference as to lower it.
    None means that nothing can be said: there are too few prompts (`verdict` says how many it takes), or there is no
    held-out reward. A reward missing in `higher_is_better` is taken as one of which more is better.
    """
    held_out = [name for name in comparison if name != guide]
    if guide not in comparison or not held_out or _prompts(comparison) < _least_prompts(len(held_out)):
        return None
    fallen = []
    for name in held_out:
        change = comparison[name]["difference"] * (1 if higher_is_better.get(name, True) else -1)
        if change < 0 and comparison[name]["p_value"] <= _FALSE_ALARMS / len(held_out):
            fallen.append(name)
    rose = comparison[guide]["difference"] > 0 and comparison[guide]["p_value"] <= _FALSE_ALARMS
    return fallen if rose else []


def verdict(comparison: Comparison, guide: str, fallen: list[str] | None, baseline: Path) -> str:
    """Returns the message for what `over_optimised` found; empty if it tested and found nothing."""
    held_out = len(comparison) - (guide in comparison)
    if guide not in comparison:
        return f"over-optimisation is not tested: {baseline} has no {guide}; draw it with the same --model.reward"
    if not held_out:
        return f"over-optimisation is not tested: no other reward than {guide} is known of both; add eval_rewards"
    if fallen is None:
        least, count = _least_prompts(held_out), _prompts(comparison)
        what = f"over-optimisation cannot be tested with {count} prompts and {held_out} held-out rewards"
        return f"{what}; draw at least {least} prompts"
    if not fallen:
        return ""

    def words(name: str) -> str:
        return f"{name} by {difference_words(comparison[name])}"

    return (
        f"over-optimisation: against {baseline} the guide improved, {words(guide)}, while held-out rewards got worse, "
        f"{', '.join(map(words, fallen))}; guide less (fewer candidates, a higher alpha), or add them to the guide "
        "with WeightedSum"
    )


def difference_words(entry: Mapping[str, Any]) -> str:
    """Returns a difference and its interval as text; without an interval, the difference alone."""
    interval = " [{ci95_low:+.3g}, {ci95_high:+.3g}]" if math.isfinite(entry["standard_error"]) else ""
    return ("{difference:+.3g}" + interval).format_map(entry)


def _prompts(comparison: Comparison) -> int:
    return min(int(entry["prompts"]) for entry in comparison.values())


def _least_prompts(rewards: int) -> int:
    """Returns the number of prompts n with which a sign flip can be significant: 2^(1 - n) <= level / rewards."""
    return math.ceil(1 + math.log2(rewards / _FALSE_ALARMS))
