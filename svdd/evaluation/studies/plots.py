"""The plots of a study: reward against compute, and held-out rewards against the guide.

Source of the colours: Okabe and Ito, Color Universal Design, 2008 (distinct for the colour-blind).
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from svdd.evaluation.metrics.intervals import t_quantile
from svdd.evaluation.rendering import shown
from svdd.evaluation.studies.results import Entry, Group
from svdd.evaluation.studies.specification import Study

__all__ = ["plot"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
_MARKERS, _LINES = "os^DvPhp<>*d", ("-", "--", "-.", ":")
_FORMS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}
_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,  # journals refuse type 3
    "svg.hashsalt": "svdd",
}
_WIDTH, _HEIGHT = 2.6, 2.2  # of a panel, in inches


class _Look(NamedTuple):
    """How a variant is drawn, equal in all panels."""

    label: str
    colour: str
    marker: str
    line: str


class _Point(NamedTuple):
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
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn = [group for group in groups if any(each.values for each in group.entries)]
    columns = 2 + max([len(group.rewards) - 1 for group in drawn], default=0)
    looks = _looks(study)
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of languages that the font lacks
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * max(1, len(drawn)) + 0.6), layout="constrained")
        panels = figure.subplots(max(1, len(drawn)), columns, squeeze=False)
        for group, row in zip(drawn, panels, strict=False):
            for axes, name in zip(row[:2], ("rows", "seconds"), strict=True):
                _against_cost(axes, study, group, looks, name)
            for axes, reward in zip(row[2:], group.rewards[1:], strict=False):
                _against_guide(axes, study, group, looks, reward)
        for axes in panels.flat:
            axes.set_visible(axes.has_data())
        _legend(figure, study, looks)
        return {form: _saved(figure, form, options) for form, options in _FORMS.items()}


def _saved(figure: Any, form: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)
    return file.getvalue()


def _looks(study: Study) -> dict[str, _Look]:
    """Returns the look of each variant; the baseline is black, with a cross."""
    looks, k = {}, 0
    for variant in dict.fromkeys(cell.variant for cell in study.cells):
        if variant == study.baseline:
            looks[variant] = _Look(_label(variant), "black", "X", "--")
        else:
            colour, line = _COLOURS[k % len(_COLOURS)], _LINES[k // len(_COLOURS) % len(_LINES)]
            looks[variant], k = _Look(_label(variant), colour, _MARKERS[k % len(_MARKERS)], line), k + 1
    return looks


def _label(name: str) -> str:
    """Returns a name as matplotlib shows it: without formulas, on one line, and not hidden from the legend."""
    text = shown(name, "text").replace("\\", r"\\").replace("$", r"\$") or "?"
    text = text if len(text) <= 48 else f"{text[:45]}..."
    return rf"$\_${text[1:]}" if text.startswith("_") else text


def _against_cost(axes: Any, study: Study, group: Group, looks: dict[str, _Look], name: str) -> None:
    """Draws the guide reward against a cost."""
    for look, entries in _lines(group, looks):
        known = [
            (each.work[name], point, each)
            for each in entries
            if (point := _point(study, each, group.guide)) is not None and each.work[name] > 0
        ]
        known.sort(key=lambda entry: entry[0])
        x, points = [cost for cost, *_ in known], [point for _, point, _ in known]
        _draw_line(axes, look, x, [point.value for point in points], [each for *_, each in known])
        if len(points) > 1:
            axes.fill_between(
                x, *zip(*(point[1:] for point in points), strict=True), color=look.colour, alpha=0.13, lw=0
            )
        elif points:
            _bar(axes, look, x[0], points[0], "y")
    _reference(axes, study, group, (None, group.guide))
    if axes.has_data():
        axes.set_xscale("log")
        _plain_ticks(axes)
    unit = "denoiser rows per image" if name == "rows" else "seconds per image"
    axes.set(xlabel=unit, ylabel=_label(group.guide), title=_label(group.name) if name == "rows" else "")
    axes.grid(alpha=0.25, lw=0.5)


def _against_guide(axes: Any, study: Study, group: Group, looks: dict[str, _Look], reward: str) -> None:
    """Draws a held-out reward against the guide, with the baseline's level."""
    for look, entries in _lines(group, looks):
        points = [(_point(study, each, group.guide), _point(study, each, reward), each) for each in entries]
        known = [(x, y, each) for x, y, each in points if x is not None and y is not None]
        for x, y, _ in known:
            _bar(axes, look, x.value, y, "y")
            _bar(axes, look, y.value, x, "x")
        _draw_line(
            axes, look, [x.value for x, *_ in known], [y.value for _, y, _ in known], [each for *_, each in known]
        )
    _reference(axes, study, group, (group.guide, reward))
    axes.set(xlabel=_label(group.guide), ylabel=_label(reward))
    axes.grid(alpha=0.25, lw=0.5)


def _lines(group: Group, looks: dict[str, _Look]) -> list[tuple[_Look, list[Entry]]]:
    """Returns the cells of each variant."""
    return [
        (look, [each for each in group.entries if each.drawn.cell.variant == variant])
        for variant, look in looks.items()
    ]


def _point(study: Study, entry: Entry, reward: str) -> _Point | None:
    """Returns the mean, with the 95 % interval of its difference to the baseline; of the mean if there is no baseline."""
    estimate = entry.values.get((reward, "mean"))
    if estimate is None:
        return None
    value, low, high = estimate.value, math.nan, math.nan
    if (change := entry.pointwise.get(reward)) is not None:
        low, high = change.low - change.value, change.high - change.value
    elif study.baseline is None:
        high = t_quantile(0.95, len(np.unique(entry.drawn.prompts)) - 1) * estimate.error
        low = -high
    return _Point(value, value + low, value + high)


def _draw_line(axes: Any, look: _Look, x: Sequence[float], y: Sequence[float], entries: Sequence[Entry]) -> None:
    """Draws a variant's line with a marker per cell, hollow if that is unfinished."""
    axes.plot(x, y, look.line, color=look.colour, lw=1.1, zorder=3)
    for each, a, b in zip(entries, x, y, strict=True):
        fill = look.colour if each.drawn.finished else "white"
        axes.plot([a], [b], look.marker, color=look.colour, mfc=fill, mew=0.9, ms=4.5, zorder=4)


def _bar(axes: Any, look: _Look, place: float, point: _Point, axis: str) -> None:
    """Draws an interval along an axis, at a place on the other."""
    if math.isfinite(point.low):
        ends = (point.low, point.high)
        x, y = ((place, place), ends) if axis == "y" else (ends, (place, place))
        axes.plot(x, y, "-", color=look.colour, lw=0.8, alpha=0.55, zorder=2)


def _reference(axes: Any, study: Study, group: Group, rewards: Sequence[str | None]) -> None:
    """Draws the level of a baseline that takes no budget: of a reward on each axis, x first."""
    for each in group.entries:
        if each.drawn.cell.variant == study.baseline and each.drawn.cell.budget is None:
            for reward, line in zip(rewards, (axes.axvline, axes.axhline), strict=True):
                if reward is not None and (reward, "mean") in each.values:
                    line(each.values[reward, "mean"].value, color="black", lw=0.7, ls=":", zorder=1)


def _plain_ticks(axes: Any) -> None:
    """Shows the numbers of a logarithmic axis in full, 1, 2 and 5 of each power of ten if there are few powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    few = high / low < 200
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, study: Study, looks: dict[str, _Look]) -> None:
    """Puts the variants below the panels, and what the bands are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, ls=look.line, lw=1.1, ms=4.5) for look in looks.values()
    ]
    labels = [look.label for look in looks.values()]
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 12 / (max(map(len, labels), default=1) + 6))))
    what = "the mean" if study.baseline is None else f"the difference to {_label(study.baseline)}, paired"
    title = f"bands and bars: 95 % intervals of {what}, clustered by prompt; hollow: unfinished"
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=title, title_fontsize=7
    )
