"""The plot of a trajectory: frames of each image in a row, and below them the values of its particles and candidates.

Source of the colours: Okabe and Ito, Color Universal Design, 2008 (distinct for the colour-blind).
"""

import math
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from svdd import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from svdd.state.trajectory import Trajectory

__all__ = ["plot"]

_CANDIDATE, _KEPT, _OWN = "#999999", "#0072B2", "#D55E00"
_FRAME, _PANEL = 1.0, 1.15  # inches: width of a frame, height of a panel of values
_LEFT, _RIGHT, _TITLE, _STEPS, _BELOW = 0.65, 0.12, 0.32, 0.2, 0.42  # inches: margins
_STYLE = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
_TITLE_LENGTH = 90  # characters


def plot(trajectory: "Trajectory", images: list[int], columns: list[int]) -> "Figure":
    """Returns a figure with a row for each of these images, and these of the frames."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'svdd[plot]'") from error
    height, width = trajectory.frames.shape[-2:]
    strip, count = _FRAME * height / width, max(len(columns), 4)
    panel = _PANEL + _BELOW if trajectory.selections else 0.0
    row = _TITLE + strip + _STEPS + panel
    size = (_LEFT + _FRAME * count + _RIGHT, row * len(images) + 0.05)
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of languages that the font lacks
        figure = Figure(figsize=size, dpi=150)

        def axes(left: float, top: float, width: float, height: float) -> Any:
            place = (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
            return figure.add_axes(place)

        for position, image in enumerate(images):
            top = row * position
            title = f"{_shortened(trajectory.prompts[image])}   seed {trajectory.seeds[image]}"
            title += f"   reward {float(trajectory.scores[image]):.4g}"
            figure.text(_LEFT / size[0], 1 - (top + _TITLE - 0.08) / size[1], title, fontsize=8, va="bottom")
            for k, frame in enumerate(columns):
                cell = axes(_LEFT + _FRAME * k + 0.02, top + _TITLE, _FRAME - 0.04, strip - 0.04)
                cell.imshow(trajectory.frames[frame, image].permute(1, 2, 0).numpy())
                cell.set_xticks([], [])
                cell.set_yticks([], [])
                cell.spines[:].set_visible(False)
                cell.set_xlabel(f"step {trajectory.steps[frame]}", labelpad=2)
            if trajectory.selections:
                cell = axes(_LEFT, top + _TITLE + strip + _STEPS, _FRAME * count, _PANEL)
                _values(cell, trajectory, image, [trajectory.steps[frame] for frame in columns], position == 0)
    return figure


def _values(axes: Any, trajectory: "Trajectory", image: int, steps: list[int], legend: bool) -> None:
    """Draws the values of one image's candidates and particles, where possible below the frames of their steps."""
    own = int(trajectory.particles.image[trajectory.ancestors[image, -1]])  # position in the batch
    every = trajectory.selections
    once = all(a.i < b.i for a, b in pairwise(every))
    places = [selection.i for selection in every] if once else list(range(1, len(every) + 1))
    for k, (place, selection) in enumerate(zip(places, every, strict=True)):
        known = selection.values[own].double().cpu()
        known = known[known.isfinite()]
        label = "candidates" if not k else None
        axes.scatter(np.full(len(known), place), known, s=10, color=_CANDIDATE, alpha=0.7, linewidths=0, label=label)
    if once:
        if any(selection.kept.shape[1] > 1 for selection in every):
            _tree(axes, trajectory, own)
        line = trajectory.values[image]
        along = torch.arange(len(line)).double()
    else:  # several rounds of a search
        line = torch.stack([selection.values[own, selection.kept[own, 0]].cpu() for selection in every])
        along = torch.tensor(places).double()
    line = line.masked_fill(line.isinf(), math.nan)
    axes.plot(along[~line.isnan()], line[~line.isnan()], "-o", color=_OWN, markersize=3, linewidth=1.4)
    axes.lines[-1].set_label("this image" if once else "first of the kept")
    axes.set_ylabel("value")
    axes.set_xlabel("step" if once else "selection, in order")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if once and len(steps) > 3 and len({b - a for a, b in pairwise(steps)}) == 1:  # frames stand above their steps
        half = (steps[1] - steps[0]) / 2
        axes.set_xlim(steps[0] - half, steps[-1] + half)
        axes.set_xticks(steps)
    if legend:
        axes.legend(frameon=False, fontsize=6, loc="best", handlelength=1.2)


def _tree(axes: Any, trajectory: "Trajectory", own: int) -> None:
    """Draws a line from each particle with a value to its latest ancestor with one."""
    particles = trajectory.particles
    value, parent = particles.value.tolist(), particles.parent.tolist()
    numbers = (particles.image == own).nonzero().flatten().tolist()
    label: str | None = "kept particles"
    for number in numbers:
        above = parent[number]
        while above >= 0 and math.isnan(value[above]):
            above = parent[above]
        if above >= 0 and not math.isnan(value[number]):
            pair = [above, number]
            at: Tensor = particles.step[pair]
            axes.plot(at, [value[k] for k in pair], "-", color=_KEPT, linewidth=0.8, alpha=0.7, label=label)
            label = None


def _shortened(text: str) -> str:
    return text if len(text) <= _TITLE_LENGTH else f"{text[: _TITLE_LENGTH - 1]}…"
