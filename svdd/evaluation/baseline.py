"""A run against an unguided one of the same prompts: what guidance gained, and what it cost elsewhere.

A sampler that climbs one reward far enough finds pictures that please the reward and nobody else. It shows where a
reward that was only measured falls while the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdd import UserError
from svdd.evaluation.metrics.student_t import standard_error, t_quantile
from svdd.runs.folder import RunFolder

__all__ = ["against", "over_optimised", "paired", "sampler_of", "warning"]

_FALSE_ALARMS = 0.05  # of all held-out rewards together, two-sided


def against(run: Path, baseline: Path) -> dict[str, dict[str, float]]:
    """Returns what `paired` says of each reward that both runs measured; a prompt counts with the mean of its images.

    Args:
        run: A finished run.
        baseline: A finished run of the same prompts, by their index.

    Raises:
        UserError: If the runs share no prompt, have other texts for one index, or no reward in common.
    """
    ours, plain = _means(run), _means(baseline)
    shared = ours.keys() & plain.keys()
    if not shared:
        raise UserError(f"{run} and {baseline} share no prompt; draw the baseline from the same prompts")
    for index in shared:
        if ours[index][0] != plain[index][0]:
            raise UserError(
                f"prompt {index} is {ours[index][0]!r} in {run} and {plain[index][0]!r} in {baseline}; draw the "
                "baseline from the same prompts"
            )
    names = [name for name in ours[next(iter(shared))][1] if all(name in plain[index][1] for index in shared)]
    if not names:
        raise UserError(f"{run} and {baseline} measured no reward in common; add it to the baseline's eval_rewards")
    return {name: paired([ours[index][1][name] - plain[index][1][name] for index in sorted(shared)]) for name in names}


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Returns the mean of the differences of prompts, its standard error and its 95 % interval by Student's t.

    One prompt has a difference, and neither error nor interval (NaN).
    """
    count = len(differences)
    mean, error = math.fsum(differences) / count, standard_error(differences)
    half = t_quantile(0.95, count - 1) * error
    return {
        "difference": mean,
        "standard_error": error,
        "ci95_low": mean - half,
        "ci95_high": mean + half,
        "prompts": count,
    }


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


def over_optimised(
    comparison: Mapping[str, Mapping[str, float]], guide: str, higher_is_better: Mapping[str, bool]
) -> list[str]:
    """Returns the held-out rewards that fell for certain while the guide rose for certain.

    The guide rose where its 95 % interval is above 0. With k held-out rewards each has k times less room for an error
    (Bonferroni), so that noise in any of them gives a false alarm in at most 2.5 % of the runs, however few prompts
    there are.

    Args:
        comparison: What `against` returned.
        guide: The guide's name.
        higher_is_better: Of each reward.
    """
    if guide not in comparison or not comparison[guide]["ci95_low"] > 0:
        return []
    held_out = [name for name in comparison if name != guide]

    def fell(entry: Mapping[str, float], better_is_high: bool) -> bool:
        half = t_quantile(1 - _FALSE_ALARMS / len(held_out), int(entry["prompts"]) - 1) * entry["standard_error"]
        return entry["difference"] + half < 0 if better_is_high else entry["difference"] - half > 0

    return [name for name in held_out if fell(comparison[name], higher_is_better.get(name, True))]


def warning(comparison: Mapping[str, Mapping[str, float]], guide: str, fallen: list[str], baseline: Path) -> str:
    """Returns the finding in words."""

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
    sums: dict[int, tuple[str, dict[str, float], int]] = {}
    for row in RunFolder(run).rows():
        text, total, count = sums.get(row["prompt_index"], (row["prompt"], {}, 0))
        rewards = row["rewards"]
        total = {name: total.get(name, 0.0) + rewards[name] for name in rewards}
        sums[row["prompt_index"]] = (text, total, count + 1)
    return {
        index: (text, {name: value / count for name, value in total.items()})
        for index, (text, total, count) in sums.items()
    }
