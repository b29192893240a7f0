"""Comparison of a run with an unguided run of the same prompts, for the guide and for held-out rewards.

A sampler that maximises one reward too far finds pictures that only this reward likes: a held-out reward falls while
the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from svdd import UserError
from svdd.evaluation.images import RunImage, read_images
from svdd.evaluation.metrics.intervals import standard_error, t_interval
from svdd.evaluation.sign_flips import p_value

__all__ = ["against", "by_prompt", "difference_words", "over_optimised", "paired", "shared_prompts", "verdict"]

_FALSE_ALARMS = 0.05  # of all held-out rewards together, two-sided

Comparison = Mapping[str, Mapping[str, float]]


def against(run: Path, baseline: Path) -> dict[str, dict[str, float]]:
    """Returns `paired` of each reward that all images of both runs have; the images of a prompt are averaged.

    The weights of particles apply within their image. If the runs have unequal numbers of images of a prompt, only the
    first ones of the longer run are tested, so that both means vary alike.

    Raises:
        UserError: If the runs share no prompt, have different texts for one index, or share no reward.
    """
    ours, plain = by_prompt(run), by_prompt(baseline)
    texts = [{index: images[0].prompt for index, images in side.items()} for side in (ours, plain)]
    shared = shared_prompts(run, texts[0], baseline, texts[1])
    pairs = [(ours[index], plain[index]) for index in shared]
    images = [image for pair in pairs for side in pair for image in side]
    names = [name for name in images[0].rewards if all(name in image.rewards for image in images)]
    if not names:
        raise UserError(f"{run} and {baseline} measured no reward in common; add it to the baseline's eval_rewards")
    even = [(one[: len(other)], other[: len(one)]) for one, other in pairs]
    return {name: paired(_differences(pairs, name), _differences(even, name)) for name in names}


def shared_prompts(run: Path | str, ours: Mapping[int, str], baseline: Path, plain: Mapping[int, str]) -> list[int]:
    """Returns the indices of the prompts that both have; a UserError if there are none, or one has two texts."""
    shared = sorted(ours.keys() & plain.keys())
    advice = "draw the baseline from the same prompts"
    if not shared:
        raise UserError(f"{run} and {baseline} share no prompt; {advice}")
    for index in shared:
        if ours[index] != plain[index]:
            raise UserError(f"prompt {index} is {ours[index]!r} in {run} and {plain[index]!r} in {baseline}; {advice}")
    return shared


def by_prompt(run: Path) -> dict[int, list[RunImage]]:
    """Returns the images of a finished run, by the index of their prompt."""
    images = defaultdict(list)
    for (prompt, _), image in read_images(run).items():
        images[prompt].append(image)
    return images


def paired(
    differences: Sequence[float], tested: Sequence[float] | None = None, comparisons: int = 1
) -> dict[str, float]:
    """Returns the mean of the prompts' differences, its standard error, its interval by Student's t and a p-value.

    The intervals of all `comparisons` together hold with 95 % (Bonferroni: each has the level 1 - 0.05 / comparisons).
    The p-value, which is not corrected, is that of `tested`, by default the same differences. With one prompt, error
    and interval are NaN.
    """
    count, mean = len(differences), math.fsum(differences) / len(differences)
    error = standard_error([[(difference, 1.0)] for difference in differences])
    low, high = t_interval(mean, error, count, 1 - 0.05 / comparisons)
    p = p_value(differences if tested is None else tested)
    ends = {"ci95_low": low, "ci95_high": high, "p_value": p}
    return {"difference": mean, "standard_error": error, **ends, "prompts": count}


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
    """Returns the message for what `over_optimised` found; empty if there is nothing to report."""
    held_out = len(comparison) - (guide in comparison)
    if fallen is None and guide in comparison and held_out:
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


def _differences(pairs: Sequence[tuple[list[RunImage], list[RunImage]]], name: str) -> list[float]:
    return [fmean(image.rewards[name] for image in a) - fmean(image.rewards[name] for image in b) for a, b in pairs]


def _prompts(comparison: Comparison) -> int:
    return min(int(entry["prompts"]) for entry in comparison.values())


def _least_prompts(rewards: int) -> int:
    """Returns the number of prompts n with which a sign flip can be significant: 2^(1 - n) <= level / rewards."""
    return math.ceil(1 + math.log2(rewards / _FALSE_ALARMS))
