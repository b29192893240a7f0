"""A run against an unguided one of the same prompts: what guidance gained, and what it cost elsewhere.

A sampler that climbs one reward far enough finds pictures that please the reward and nobody else. It shows where a
reward that was only measured falls while the guide rises (Gao et al., 2022, arXiv 2210.10760).
"""

import math
from collections.abc import Mapping
from pathlib import Path

from svdd.errors import UserError
from svdd.metrics.bootstrap import bootstrap_interval
from svdd.picture_files import read_rows

__all__ = ["against", "over_optimised", "warning"]


def against(run: Path, baseline: Path) -> dict[str, dict[str, float]]:
    """Returns, for each reward that both runs measured, the mean difference and its 95 % interval over prompts.

    A prompt counts with the mean of its images.

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
    result = {}
    for name in names:
        differences = [ours[index][1][name] - plain[index][1][name] for index in sorted(shared)]
        low, high = bootstrap_interval([[difference] for difference in differences])
        mean = math.fsum(differences) / len(differences)
        result[name] = {"difference": mean, "ci95_low": low, "ci95_high": high, "prompts": len(differences)}
    return result


def over_optimised(
    comparison: Mapping[str, Mapping[str, float]], guide: str, higher_is_better: Mapping[str, bool]
) -> list[str]:
    """Returns the held-out rewards that fell for certain while the guide rose for certain (95 % intervals).

    Args:
        comparison: What `against` returned.
        guide: The guide's name.
        higher_is_better: Of each reward.
    """
    if guide not in comparison or not comparison[guide]["ci95_low"] > 0:
        return []
    return [
        name
        for name, entry in comparison.items()
        if name != guide and (entry["ci95_high"] < 0 if higher_is_better.get(name, True) else entry["ci95_low"] > 0)
    ]


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
    for row in read_rows(run):
        text, total, count = sums.get(row["prompt_index"], (row["prompt"], {}, 0))
        rewards = row["rewards"]
        total = {name: total.get(name, 0.0) + rewards[name] for name in rewards}
        sums[row["prompt_index"]] = (text, total, count + 1)
    return {
        index: (text, {name: value / count for name, value in total.items()})
        for index, (text, total, count) in sums.items()
    }
