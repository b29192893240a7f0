"""The plots of a study: reward against compute, and held-out rewards against the guide.

Source of the colours: Okabe and Ito, Color Universal Design, 2008 (distinct for the colour-blind).
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from svdd.evaluation.metrics.intervals import t_quantile
from svdd.evaluation.rendering import shown
from svdd.evaluation.studies.results import Entry, Group
from svdd.evaluation.studies.specification import Study

__all__ = [
    "FORMS",
    "STYLE",
    "Look",
    "Point",
    "bar",
    "label_of",
    "legend",
    "legend_rows",
    "looks_of",
    "plot",
    "point_of",
    "saved",
]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
_MARKERS, _LINES = "os^DvPhp<>*d", ("-", "--", "-.", ":")
FORMS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 250},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,  # journals refuse type 3
    "svg.hashsalt": "svdd",
}
_PAGE, _LEAST, _MOST, _HEIGHT = 7.2, 1.8, 2.4, 1.75  # inches: width of a page and of a panel; height of a panel


class Look(NamedTuple):
    """How a variant is drawn, equal in all panels."""

    label: str
    colour: str
    marker: str
    line: str


class Point(NamedTuple):
    """A number and its 95 % interval; the latter is NaN if it is unknown."""

    value: float
    low: float
    high: float


def plot(study: Study, groups: Sequence[Group]) -> dict[str, bytes]:
    """Returns the contents of a png, a pdf and an svg file, by form; nothing without matplotlib.

    There is a row of panels for each guide: its reward against denoiser rows and against seconds, then each held-out
    reward against it.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn = [group for group in groups if any(each.values for each in group.entries)]
    columns = 2 + max([len(group.rewards) - 1 for group in drawn], default=0)
    looks = looks_of(study)
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of languages that the font lacks
        width = columns * min(_MOST, max(_LEAST, _PAGE / columns))
        height = _HEIGHT * max(1, len(drawn)) + 0.4 + 0.14 * legend_rows(looks, width)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(max(1, len(drawn)), columns, squeeze=False)
        for group, row in zip(drawn, panels, strict=False):
            for axes, name in zip(row[:2], ("rows", "seconds"), strict=True):
                _against_cost(axes, study, group, looks, name)
            for axes, reward in zip(row[2:], group.rewards[1:], strict=False):
                _against_guide(axes, study, group, looks, reward)
        for axes in panels.flat:
            axes.set_visible(axes.has_data())
        legend(figure, study, drawn, looks)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once for all forms
        return {form: saved(figure, form, options) for form, options in FORMS.items()}


def saved(figure: Any, form: str, options: dict[str, Any]) -> bytes:
    """Returns a figure as the content of a file."""
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)
    return file.getvalue()


def looks_of(study: Study) -> dict[str, Look]:
    """Returns the look of each variant; the baseline is black, with a cross.

    Where there are more variants than colours, those of one grid share a colour, and their markers and lines differ.
    """
    variants = [variant for variant in dict.fromkeys(cell.variant for cell in study.cells) if variant != study.baseline]
    grids = [re.sub(r"( \S+=\S+)+$", "", variant) for variant in variants]
    shared = len(variants) > len(_COLOURS) >= len({*grids})
    names = grids if shared else variants
    order = list(dict.fromkeys(names))
    looks = {} if study.baseline is None else {study.baseline: Look(label_of(study.baseline), "black", "X", "--")}
    for k, (variant, name) in enumerate(zip(variants, names, strict=True)):
        place = order.index(name)
        turn = names[:k].count(name) if shared else place // len(_COLOURS)
        marker, line = _MARKERS[k % len(_MARKERS)], _LINES[turn % len(_LINES)]
        looks[variant] = Look(label_of(variant), _COLOURS[place % len(_COLOURS)], marker, line)
    return looks


def label_of(name: str) -> str:
    """Returns a name as matplotlib shows it: without formulas, on one line, and not hidden from the legend."""
    text = shown(name, "text") or "?"
    text = text if len(text) <= 48 else f"{text[:22]}...{text[-23:]}"
    text = text.replace("\\", r"\\").replace("$", r"\$")
    return rf"$\_${text[1:]}" if text.startswith("_") else text


def _against_cost(axes: Any, study: Study, group: Group, looks: dict[str, Look], name: str) -> None:
    """Draws the guide reward against a cost."""
    for look, entries in _lines(group, looks):
        known = [
            (each.work[name], point, each)
            for each in entries
            if (point := point_of(study, group, each, group.guide)) is not None and each.work[name] > 0
        ]
        known.sort(key=lambda entry: entry[0])
        x, points = [cost for cost, *_ in known], [point for _, point, _ in known]
        _draw_line(axes, look, x, [point.value for point in points], [each for *_, each in known])
        if len(points) > 1:
            axes.fill_between(
                x, *zip(*(point[1:] for point in points), strict=True), color=look.colour, alpha=0.16, lw=0
            )
        elif points:
            bar(axes, look, x[0], points[0], "y")
    _reference(axes, study, group, (None, group.guide))
    if axes.has_data():
        axes.set_xscale("log")
        _plain_ticks(axes)
    unit = "denoiser rows per image" if name == "rows" else "seconds per image"
    axes.set(xlabel=unit, ylabel=label_of(group.guide))
    if name == "rows":
        axes.set_title(f"guide: {label_of(group.name or group.guide)}", loc="left", weight="bold")
    axes.grid(alpha=0.25, lw=0.5)


def _against_guide(axes: Any, study: Study, group: Group, looks: dict[str, Look], reward: str) -> None:
    """Draws a held-out reward against the guide, with the baseline's level."""
    for look, entries in _lines(group, looks):
        points = [
            (point_of(study, group, each, group.guide), point_of(study, group, each, reward), each) for each in entries
        ]
        known = [(x, y, each) for x, y, each in points if x is not None and y is not None]
        for x, y, _ in known:
            bar(axes, look, x.value, y, "y")
            bar(axes, look, y.value, x, "x")
        _draw_line(
            axes, look, [x.value for x, *_ in known], [y.value for _, y, _ in known], [each for *_, each in known]
        )
    _reference(axes, study, group, (group.guide, reward))
    axes.set(xlabel=label_of(group.guide), ylabel=label_of(reward))
    axes.grid(alpha=0.25, lw=0.5)


def _lines(group: Group, looks: dict[str, Look]) -> list[tuple[Look, list[Entry]]]:
    """Returns the cells of each variant."""
    return [
        (look, [each for each in group.entries if each.drawn.cell.variant == variant])
        for variant, look in looks.items()
    ]


def point_of(study: Study, group: Group, entry: Entry, reward: str) -> Point | None:
    """Returns the mean, with the 95 % interval of its difference to the baseline, or its own if the study has none.

    The difference is added to the baseline's mean, so that an unfinished cell is at its place among the others.
    """
    estimate, change = entry.values.get((reward, "mean")), entry.differences.get((reward, "mean"))
    if estimate is None:
        return None
    value, error, prompts = estimate.value, estimate.error, len(np.unique(entry.drawn.prompts))
    if change is not None:
        plain = next(each for each in group.entries if each.drawn.cell.name == entry.baseline)
        value, error, prompts = plain.values[reward, "mean"].value + change.value, change.error, change.prompts
    elif study.baseline is not None:
        error = math.nan
    half = t_quantile(0.95, prompts - 1) * error
    return Point(value, value - half, value + half)


def _draw_line(axes: Any, look: Look, x: Sequence[float], y: Sequence[float], entries: Sequence[Entry]) -> None:
    """Draws a variant's line with a marker per cell, hollow if that is unfinished."""
    axes.plot(x, y, look.line, color=look.colour, lw=1, zorder=3)
    for each, a, b in zip(entries, x, y, strict=True):
        fill = look.colour if each.drawn.finished else "white"
        axes.plot([a], [b], look.marker, color=look.colour, mfc=fill, mew=0.8, ms=3.8, zorder=4)


def bar(axes: Any, look: Look, place: float, point: Point, axis: str) -> None:
    """Draws an interval along an axis, at a place on the other."""
    if math.isfinite(point.low):
        ends = (point.low, point.high)
        x, y = ((place, place), ends) if axis == "y" else (ends, (place, place))
        axes.plot(x, y, "-", color=look.colour, lw=0.7, alpha=0.55, zorder=2)


def _reference(axes: Any, study: Study, group: Group, rewards: Sequence[str | None]) -> None:
    """Draws the level of a baseline that takes no budget: of a reward on each axis, x first."""
    for each in group.entries:
        if each.drawn.cell.variant == study.baseline and each.drawn.cell.budget is None:
            for reward, line in zip(rewards, (axes.axvline, axes.axhline), strict=True):
                if reward is not None and (reward, "mean") in each.values:
                    line(each.values[reward, "mean"].value, color="black", lw=0.7, ls=":", zorder=1)


def _plain_ticks(axes: Any) -> None:
    """Writes the numbers of a logarithmic axis in full, and more of them the fewer powers of ten it has."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    subs = (1, 2, 3, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 200 else (1,)
    axes.xaxis.set_major_locator(LogLocator(10, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def legend_rows(looks: dict[str, Look], width: float) -> int:
    """Returns the rows that the legend takes below a figure of a width in inches, of about 16 letters each."""
    longest = max((len(look.label) for look in looks.values()), default=0)
    return max(1, math.ceil(len(looks) / max(1, int(width * 16 / (longest + 8)))))


def legend(figure: Any, study: Study, groups: Sequence[Group], looks: dict[str, Look], more: str = "") -> None:
    """Puts the variants below the panels, and what bands, bars and hollow markers are, and `more`."""
    from matplotlib.lines import Line2D

    labels = [look.label for look in looks.values()]
    handles = [
        Line2D([], [], color=each.colour, marker=each.marker, ls=each.line, lw=1, ms=3.8) for each in looks.values()
    ]
    what = "the mean" if study.baseline is None else f"the difference to {label_of(study.baseline)}, paired"
    title = f"Bands and bars: 95 % intervals of {what}, clustered by prompt."
    if any(each.values and not each.drawn.finished for group in groups for each in group.entries):
        title += " Hollow: unfinished."
    title += more
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=math.ceil(len(labels) / legend_rows(looks, figure.get_figwidth())),
        frameon=False,
        title=title,
        title_fontsize=6,
    )
