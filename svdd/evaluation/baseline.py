"""Comparison of a run with an unguided run of the same prompts, for the guide and for held-out rewards.

A sampler that maximises one reward too far finds pictures that only this reward likes: a held-out reward falls while
the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdd import UserError
from svdd.evaluation.metrics.intervals import t_quantile
from svdd.runs.folder import RunFolder

__all__ = ["against", "over_optimised", "paired", "warning"]

_FALSE_ALARMS = 0.05  # of all held-out rewards together, two-sided

Comparison = Mapping[str, Mapping[str, float]]


def against(run: Path, baseline: Path) -> dict[str, dict[str, float]]:
    """Returns `paired` of each reward that both finished runs measured; the images of a prompt are averaged.

    Raises:
        UserError: If the runs share no prompt, have different texts for one index, or share no reward.
    """
    ours, plain = _means(run), _means(baseline)
    shared = sorted(ours.keys() & plain.keys())
    advice = "draw the baseline from the same prompts"
    if not shared:
        raise UserError(f"{run} and {baseline} share no prompt; {advice}")
    for index in shared:
        one, other = ours[index][0], plain[index][0]
        if one != other:
            raise UserError(f"prompt {index} is {one!r} in {run} and {other!r} in {baseline}; {advice}")
    names = [name for name in ours[shared[0]][1] if all(name in plain[index][1] for index in shared)]
    if not names:
        raise UserError(f"{run} and {baseline} measured no reward in common; add it to the baseline's eval_rewards")
    return {name: paired([ours[index][1][name] - plain[index][1][name] for index in shared]) for name in names}


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Returns the mean of the prompts' differences, its standard error and its 95 % interval by Student's t.

    With one prompt, error and interval are NaN.
    """
    count = len(differences)
    mean = math.fsum(differences) / count
    squares = math.fsum((difference - mean) ** 2 for difference in differences)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
    half = t_quantile(0.95, count - 1) * error
    ends = {"ci95_low": mean - half, "ci95_high": mean + half}
    return {"difference": mean, "standard_error": error, **ends, "prompts": count}


def over_optimised(comparison: Comparison, guide: str, higher_is_better: Mapping[str, bool]) -> list[str]:
    """Returns the held-out rewards that became significantly worse while the guide rose significantly.

    The guide rose if its 95 % interval is above 0. Intervals of held-out rewards are Bonferroni-corrected, so that
    noise gives a false alarm in at most 2.5 % of the runs, however few prompts there are. A reward missing in
    `higher_is_better` is taken as one of which more is better.
    """
    if guide not in comparison or not comparison[guide]["ci95_low"] > 0:
        return []
    fallen, level = [], 1 - _FALSE_ALARMS / max(1, len(comparison) - 1)
    for name, entry in comparison.items():
        change = entry["difference"] if higher_is_better.get(name, True) else -entry["difference"]
        if name != guide and change + t_quantile(level, int(entry["prompts"]) - 1) * entry["standard_error"] < 0:
            fallen.append(name)
    return fallen


def warning(comparison: Comparison, guide: str, fallen: list[str], baseline: Path) -> str:
    """Returns the message for the rewards that `over_optimised` found."""

    def words(name: str) -> str:
        entry = comparison[name]
        return f"{name} by {entry['difference']:+.3g} [{entry['ci95_low']:+.3g}, {entry['ci95_high']:+.3g}]"

    return (
        f"over-optimisation: against {baseline} the guide improved, {words(guide)}, while held-out rewards got worse, "
        f"{', '.join(map(words, fallen))}; guide less (fewer candidates, a higher alpha), or add them to the guide "
        "with WeightedSum"
    )


def _means(run: Path) -> dict[int, tuple[str, dict[str, float]]]:
    """Returns the text and the mean rewards of every prompt, by its index."""
    texts: dict[int, str] = {}
    totals: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[int, int] = defaultdict(int)
    for row in RunFolder(run).rows():
        index = row["prompt_index"]
        texts.setdefault(index, row["prompt"])
        counts[index] += 1
        for name, score in row["rewards"].items():
            totals[index][name] += score
    return {
        index: (text, {name: total / counts[index] for name, total in totals[index].items()})
        for index, text in texts.items()
    }
