"""The numbers of a study's tables and plots: an entry per cell, in a group per guide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from svdd import say
from svdd.evaluation.baseline import over_optimised
from svdd.evaluation.pairing import incomparable
from svdd.evaluation.studies.comparisons import Difference, Estimate, differences, estimates, scores_of
from svdd.evaluation.studies.measures import Drawn
from svdd.evaluation.studies.specification import Study

__all__ = ["Entry", "Group", "groups_of"]

Key = tuple[str, str]  # a reward and a statistic


@dataclass(frozen=True)
class Entry:
    """The numbers of a cell; what it cannot tell is missing, or NaN.

    Args:
        drawn: The cell, and what it has drawn.
        baseline: The cell with which it is compared; None if there is none, or if it is a baseline itself.
        values: Statistics by reward and name, those of the study and the mean.
        differences: Their differences to the baseline, in intervals that hold together for the group.
        path_kl: The mean of `path_kl_sample`.
        diversity: As in `Diversity`.
        work: The means of `Drawn.work` over pictures, with `rows`, in whole denoiser rows.
        over_optimised: Held-out rewards that fell while the guide rose; None if that cannot be tested.
    """

    drawn: Drawn
    baseline: str | None
    values: dict[Key, Estimate]
    differences: dict[Key, Difference]
    path_kl: Estimate | None
    diversity: Mapping[str, float | None]
    work: dict[str, float]
    over_optimised: list[str] | None


@dataclass(frozen=True)
class Group:
    """The cells of one guide.

    Args:
        name: The guide's name in the study.
        guide: The reward that guides; empty while nothing is drawn.
        rewards: All rewards that a cell has measured, the guide first.
        entries: In the order of the study.
        comparisons: The comparisons of one reward with the baseline, over which its intervals are corrected.
        unit: Network rows of a whole denoiser row.
        lower_is_better: The rewards whose lowest scores are the best.
    """

    name: str
    guide: str
    rewards: list[str]
    entries: list[Entry]
    comparisons: int
    unit: int
    lower_is_better: frozenset[str]


def groups_of(study: Study, drawn: Sequence[Drawn], diversity: Mapping[str, Mapping[str, float | None]]) -> list[Group]:
    """Returns the numbers of each guide's cells; `diversity` is by the names of the cells."""
    names = dict.fromkeys(cell.guide for cell in study.cells)
    return [_group(study, name, [each for each in drawn if each.cell.guide == name], diversity) for name in names]


def _group(study: Study, name: str, drawn: list[Drawn], diversity: Mapping[str, Mapping[str, float | None]]) -> Group:
    rewards = list(dict.fromkeys(reward for each in drawn for reward in each.rewards))  # the first cell's guide first
    guide = rewards[0] if rewards else ""
    lower = frozenset[str]().union(*(each.lower_is_better for each in drawn))
    others = sum(each.cell.variant != study.baseline for each in drawn) if _baselines(study, drawn) else 0
    group = Group(name, guide, rewards, [], others * len(study.statistics), _unit(drawn), lower)
    entries = [_entry(study, group, each, _baseline_of(study, each, drawn), diversity) for each in drawn]
    return replace(group, entries=entries)


def _baselines(study: Study, drawn: Sequence[Drawn]) -> list[Drawn]:
    return [each for each in drawn if each.cell.variant == study.baseline]


def _baseline_of(study: Study, drawn: Drawn, others: Sequence[Drawn]) -> Drawn | None:
    """Returns the cell of the baseline with the same budget, or its only cell if it takes no budget."""
    if drawn.cell.variant == study.baseline:
        return None
    fitting = [each for each in _baselines(study, others) if each.cell.budget in (None, drawn.cell.budget)]
    return fitting[0] if fitting else None


def _entry(
    study: Study,
    group: Group,
    drawn: Drawn,
    baseline: Drawn | None,
    diversity: Mapping[str, Mapping[str, float | None]],
) -> Entry:
    values: dict[Key, Estimate] = {}
    changes: dict[Key, Difference] = {}
    statistics = list(dict.fromkeys(["mean", *study.statistics]))
    others = set() if baseline is None else incomparable(drawn, baseline)
    for reward in sorted(others - ({group.guide} if study.fronts else set())):  # a sum whose weights vary
        _warn(drawn, baseline, f"{reward} was measured with other weights or settings")
    for reward in group.rewards:
        if (scores := scores_of(drawn, reward)) is None:
            continue
        best_is_high = reward not in group.lower_is_better
        values |= {(reward, key): each for key, each in estimates(scores, statistics, best_is_high).items()}
        if baseline is None or reward in others or (plain := scores_of(baseline, reward)) is None:
            continue
        found = differences(scores, plain, statistics, group.comparisons, best_is_high)
        changes |= {(reward, key): each for key, each in found.items()}
    shared = set() if baseline is None else (drawn.rewards.keys() & baseline.rewards.keys()) - others
    if baseline is not None and shared and not changes and drawn.finished and baseline.finished:
        _warn(drawn, baseline, "images of other prompts or random seeds were drawn")
    divergence = scores_of(drawn, "path_kl_sample")
    return Entry(
        drawn,
        None if baseline is None else baseline.cell.name,
        values,
        changes,
        None if divergence is None else estimates(divergence, ["mean"])["mean"],
        diversity.get(drawn.cell.name, {}),
        _work(drawn, group.unit),
        _over_optimised(group, changes),
    )


def _warn(drawn: Drawn, baseline: Drawn | None, what: str) -> None:
    name = "" if baseline is None else baseline.cell.name
    say(f"svdd: warning: {what} in {drawn.cell.name} than in {name}: no difference", error=True)


def _unit(drawn: Sequence[Drawn]) -> int:
    """Returns the network rows of a whole denoiser row: 2 with classifier-free guidance. Previews need less."""
    ratios = [
        float(np.nanmax(each.work["network_rows"] / each.work["denoiser_rows"]))
        for each in drawn
        if np.isfinite(each.work["network_rows"]).any() and (each.work["denoiser_rows"] > 0).all()
    ]
    return max(1, math.ceil(max(ratios, default=1.0) - 1e-6))


def _work(drawn: Drawn, unit: int) -> dict[str, float]:
    """Returns the means per picture; a backward pass counts as two more of the rows it goes through."""
    means = {name: float(column.mean()) if len(column) else math.nan for name, column in drawn.work.items()}
    forward, whole = means["network_rows"], means["denoiser_rows"]
    backward = means["gradient_rows"] and 2 * means["gradient_rows"] * forward / (whole or math.nan)
    return means | {"rows": (forward + backward) / unit}


def _over_optimised(group: Group, changes: Mapping[Key, Difference]) -> list[str] | None:
    """Returns what `over_optimised` finds, at p-values that are corrected for the comparisons of the group."""
    found = {reward: each for (reward, key), each in changes.items() if key == "mean"}
    if not found:
        return None
    prompts, held_out = min(each.prompts for each in found.values()), len(found) - (group.guide in found)
    if not held_out or 2.0 ** (1 - prompts) * group.comparisons * held_out > 0.05:  # the smallest p-value
        return None
    comparison = {
        reward: {
            "difference": each.value,
            "p_value": min(1.0, each.p_value * group.comparisons),
            "prompts": each.prompts,
        }
        for reward, each in found.items()
    }
    return over_optimised(comparison, group.guide, {reward: False for reward in group.lower_is_better})
