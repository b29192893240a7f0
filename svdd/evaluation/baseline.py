"""A run compared with an unguided run of the same prompts: what guidance gained, and what it cost in other rewards.

A sampler that maximises one reward far enough finds pictures that only this reward likes. It shows where a held-out
reward falls while the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdd import UserError
from svdd.evaluation.metrics.intervals import standard_error, t_quantile
from svdd.runs.folder import RunFolder

__all__ = ["against", "over_optimised", "paired", "sampler_of", "warning"]

_FALSE_ALARMS = 0.05  # of all held-out rewards together, two-sided

Comparison = Mapping[str, Mapping[str, float]]


def against(run: Path, baseline: Path) -> dict[str, dict[str, float]]:
    """Returns `paired` of each reward that both finished runs measured; a prompt counts with the mean of its images.

    Raises:
        UserError: If the runs share no prompt, have different texts for one index, or share no reward.
    """
    ours, plain = _means(run), _means(baseline)
    shared = sorted(ours.keys() & plain.keys())
    if not shared:
        raise UserError(f"{run} and {baseline} share no prompt; draw the baseline from the same prompts")
    for index in shared:
        if ours[index][0] != plain[index][0]:
            raise UserError(
                f"prompt {index} is {ours[index][0]!r} in {run} and {plain[index][0]!r} in {baseline}; draw the "
                "baseline from the same prompts"
            )
    names = [name for name in ours[shared[0]][1] if all(name in plain[index][1] for index in shared)]
    if not names:
        raise UserError(f"{run} and {baseline} measured no reward in common; add it to the baseline's eval_rewards")
    return {name: paired([ours[index][1][name] - plain[index][1][name] for index in shared]) for name in names}


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Returns the mean of the prompts' differences, its standard error and its 95 % interval by Student's t.

    With one prompt, error and interval are NaN.
    """
    count = len(differences)
    mean, error = math.fsum(differences) / count, standard_error(differences)
    half = t_quantile(0.95, count - 1) * error
    ends = {"ci95_low": mean - half, "ci95_high": mean + half}
    return {"difference": mean, "standard_error": error, **ends, "prompts": count}


def sampler_of(run: Path) -> str:
    """Returns the name of the sampler that drew a finished run.

    Raises:
        UserError: If the run has no summary that names it.
    """
    folder = RunFolder(run)
    summary = folder.read_summary()
    if "sampler" not in summary:
        raise UserError(f"{folder.summary} names no sampler; run the same `svdd predict` to its end")
    return str(summary["sampler"])


def over_optimised(comparison: Comparison, guide: str, higher_is_better: Mapping[str, bool]) -> list[str]:
    """Returns the held-out rewards that fell significantly while the guide rose significantly.

    The guide rose if its 95 % interval is above 0. Intervals of held-out rewards are Bonferroni-corrected, so that
    noise gives a false alarm in at most 2.5 % of the runs, however few prompts there are.

    Args:
        comparison: The result of `against`.
        guide: The guide's name.
        higher_is_better: By reward; true if missing.
    """
    if guide not in comparison or not comparison[guide]["ci95_low"] > 0:
        return []
    held_out = [name for name in comparison if name != guide]

    def fell(entry: Mapping[str, float], better_is_high: bool) -> bool:
        half = t_quantile(1 - _FALSE_ALARMS / len(held_out), int(entry["prompts"]) - 1) * entry["standard_error"]
        return entry["difference"] + half < 0 if better_is_high else entry["difference"] - half > 0

    return [name for name in held_out if fell(comparison[name], higher_is_better.get(name, True))]


def warning(comparison: Comparison, guide: str, fallen: list[str], baseline: Path) -> str:
    """Returns the message for the rewards that `over_optimised` found."""

    def words(name: str) -> str:
        entry = comparison[name]
        return f"{name} by {entry['difference']:+.3g} [{entry['ci95_low']:+.3g}, {entry['ci95_high']:+.3g}]"

    return (
        f"over-optimisation: against {baseline} the guide improved, {words(guide)}, while held-out rewards got worse, "
        f"{', '.join(words(name) for name in fallen)}; guide less (fewer candidates, a higher alpha), or add them to "
        "the guide with WeightedSum"
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
