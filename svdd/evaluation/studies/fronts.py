"""Trade-offs between two rewards: which runs of a budget no other run beats in both, and a plot of them.

Source: Berger, Multiparameter hypothesis testing and acceptance sampling, 1982 (intersection-union tests).
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from svdd import did_you_mean, say
from svdd.evaluation.pairing import incomparable
from svdd.evaluation.studies.comparisons import differences, scores_of
from svdd.evaluation.studies.plots import (
    FORMS,
    STYLE,
    Look,
    Point,
    bar,
    label_of,
    legend,
    legend_rows,
    looks_of,
    point_of,
    saved,
)
from svdd.evaluation.studies.results import Entry, Group
from svdd.evaluation.studies.specification import Study

__all__ = ["check_names", "plot_fronts", "standings"]

Standing = Literal["front", "open", "dominated"]
_SIDE, _FAINT = 3.0, 0.35  # inches of a panel; opacity of a run that is not on the front


def check_names(study: Study, groups: Sequence[Group]) -> None:
    """Warns of rewards in `fronts` that no run has measured."""
    known = list(dict.fromkeys(reward for group in groups for reward in group.rewards))
    for name in dict.fromkeys(name for pair in study.fronts for name in pair):
        if known and name not in known:
            hint = did_you_mean(name, known)
            say(f"svdd: warning: fronts: no run measured {name!r}; measured: {', '.join(known)}{hint}", error=True)


def standings(study: Study, group: Group, rewards: tuple[str, str]) -> dict[str, Standing]:
    """Returns where each run with both rewards stands among those of its budget, by the names of the cells.

    Runs without a budget stand among all. A run is on the `front` if no rival is as good in both rewards and better in
    one, by the means. It is `dominated` if a rival is better in both beyond doubt: for each reward a one-sided paired
    t-test over prompts at 2.5 % divided by the number of rivals; such an intersection-union test needs no correction
    for the two rewards. Otherwise its place is `open`: noise may have put it behind.
    """
    known = {each.drawn.cell.name: each for each in group.entries if _place(study, group, each, rewards) is not None}
    found: dict[str, Standing] = {}
    for name, entry in known.items():
        rivals = [each for each in known.values() if each is not entry and _same_budget(entry, each)]
        own = _oriented(study, group, entry, rewards)
        others = [_oriented(study, group, each, rewards) for each in rivals]
        behind = [rival for rival, other in zip(rivals, others, strict=True) if _dominates(other, own)]
        beaten = any(_surely_better(group, rival, entry, rewards, len(rivals)) for rival in behind)
        found[name] = "front" if not behind else "dominated" if beaten else "open"
    return found


def _same_budget(one: Entry, other: Entry) -> bool:
    budgets = {one.drawn.cell.budget, other.drawn.cell.budget}
    return len(budgets) == 1 or None in budgets


def _dominates(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one >= other).all() and (one > other).any())


def _place(study: Study, group: Group, entry: Entry, rewards: tuple[str, str]) -> tuple[Point, Point] | None:
    """Returns the means of both rewards, with their intervals; None if one is unknown."""
    x, y = (point_of(study, group, entry, reward) for reward in rewards)
    return None if x is None or y is None else (x, y)


def _oriented(study: Study, group: Group, entry: Entry, rewards: tuple[str, str]) -> np.ndarray:
    """Returns the means of both rewards, so that higher is better, [2]."""
    place = _place(study, group, entry, rewards)
    assert place is not None
    return np.array([point.value for point in place]) * [_sign(group, reward) for reward in rewards]


def _sign(group: Group, reward: str) -> int:
    return -1 if reward in group.lower_is_better else 1


def _surely_better(group: Group, one: Entry, other: Entry, rewards: tuple[str, str], comparisons: int) -> bool:
    if incomparable(one.drawn, other.drawn) & {*rewards}:
        return False
    for reward in rewards:
        ours, theirs = (scores_of(each.drawn, reward) for each in (one, other))
        if ours is None or theirs is None:
            return False
        change = differences(ours, theirs, ["mean"], comparisons).get("mean")
        if change is None or not (change.low > 0 if _sign(group, reward) > 0 else change.high < 0):
            return False
    return True


def plot_fronts(study: Study, groups: Sequence[Group]) -> dict[str, bytes]:
    """Returns the contents of a png, a pdf and an svg file, by form; nothing without matplotlib or such pairs.

    There is a row of panels for each guide, and a panel for each pair of rewards, one on each axis.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn = [group for group in groups if any(_places(study, group, pair) for pair in study.fronts)]
    if not drawn:
        return {}
    looks = looks_of(study)
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of languages that the font lacks
        width = max(_SIDE * len(study.fronts), 4.5)
        height = 0.85 * _SIDE * len(drawn) + 0.4 + 0.14 * legend_rows(looks, width)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(len(drawn), len(study.fronts), squeeze=False)
        for group, row in zip(drawn, panels, strict=True):
            for axes, pair in zip(row, study.fronts, strict=True):
                _draw(axes, study, group, looks, pair)
            row[0].set_title(f"guide: {label_of(group.name or group.guide)}", loc="left", weight="bold")
        for axes in panels.flat:
            axes.set_visible(axes.has_data())
        more = " Steps: the front of a budget.\nFull: on it. Half: behind, within noise. Faint: dominated beyond doubt."
        legend(figure, study, drawn, looks, more)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once for all forms
        return {form: saved(figure, form, options) for form, options in FORMS.items()}


def _places(study: Study, group: Group, rewards: tuple[str, str]) -> list[tuple[Entry, Point, Point]]:
    found = [(entry, _place(study, group, entry, rewards)) for entry in group.entries]
    return [(entry, *place) for entry, place in found if place is not None]


def _draw(axes: Any, study: Study, group: Group, looks: dict[str, Look], rewards: tuple[str, str]) -> None:
    """Draws the runs of a guide, and the front of each budget."""
    places, found = _places(study, group, rewards), standings(study, group, rewards)
    for entry, x, y in places:
        cell, look = entry.drawn.cell, looks[entry.drawn.cell.variant]
        opacity = {"front": 1.0, "open": 0.6, "dominated": _FAINT}[found[cell.name]]
        faint = look._replace(colour=_mixed(look.colour, opacity))
        bar(axes, faint, x.value, y, "y")
        bar(axes, faint, y.value, x, "x")
        fill = faint.colour if entry.drawn.finished else "white"
        size = 5.5 if found[cell.name] == "front" else 3.8
        axes.plot([x.value], [y.value], look.marker, color=faint.colour, mfc=fill, mew=0.8, ms=size, zorder=4)
    given = {entry.drawn.cell.budget for entry, *_ in places}
    budgets = sorted(budget for budget in given if budget is not None)
    for budget in budgets or (None,):
        best = [
            (x.value, y.value)
            for entry, x, y in places
            if entry.drawn.cell.budget in (None, budget) and found[entry.drawn.cell.name] == "front"
        ]
        best.sort(key=lambda place: place[0] * _sign(group, rewards[0]))
        if best:
            corners = [(x, after) for (x, _), (_, after) in pairwise(best)]
            steps = [best[0], *(place for pair in zip(corners, best[1:], strict=True) for place in pair)]
            axes.plot(*zip(*steps, strict=True), "-", color="0.45", lw=0.8, zorder=1)
        if best and len(budgets) > 1:
            axes.annotate(str(budget), best[-1], (3, 3), textcoords="offset points", fontsize=6, color="0.35")
    axes.set(xlabel=_axis(group, rewards[0]), ylabel=_axis(group, rewards[1]))
    axes.grid(alpha=0.25, lw=0.5)


def _axis(group: Group, reward: str) -> str:
    return label_of(reward) + (" (lower is better)" if reward in group.lower_is_better else "")


def _mixed(colour: str, opacity: float) -> str:
    """Returns a colour over white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (1 - opacity * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))
