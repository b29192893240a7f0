"""What the page shows of a job, as HTML that holds its pictures, so that no file is served."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from svdd.commands.app.engine import Drawn, Progress

__all__ = ["LATER", "costs", "message", "pictures", "plot", "progress", "rewards"]

_UNGUIDED, _GUIDED, _SPREAD = "#777777", "#0072B2", "#56B4E9"


def message(text: str, is_error: bool = False) -> str:
    """Returns a line of text."""
    return f'<p class="svdd-status{" svdd-error" if is_error else ""}" role="status">{escape(text)}</p>'


LATER = message("Shown when the pictures are drawn.")


def progress(now: Progress) -> str:
    """Returns where the job is."""
    value = "" if now.value is None or not math.isfinite(now.value) else f", mean value {now.value:.4g}"
    what = f"{'Guided' if now.guided else 'Unguided'}: step {now.step} of {now.steps}{value}"
    share = 100 * now.step / now.steps
    return f'{message(what)}<div class="svdd-bar"><div style="width:{share:.0f}%"></div></div>'


def pictures(plain: Drawn | None, guided: Drawn | None, now: Progress | None = None) -> str:
    """Returns the unguided and guided pictures side by side, with previews of those that are still being drawn."""
    columns = {False: _column(plain), True: _column(guided)}
    if now is not None and not columns[now.guided]:
        columns[now.guided] = [_preview(frame) for frame in now.frames]
    if not any(columns.values()):
        return ""
    count = max(map(len, columns.values()))
    cells = "".join(
        (columns[guided][k] if k < len(columns[guided]) else "<figure></figure>")
        for k in range(count)
        for guided in (False, True)
    )
    return f'<div class="svdd-pairs"><h4>Unguided</h4><h4>Guided</h4>{cells}</div>'


def rewards(plain: Drawn, guided: Drawn, held_out_from: int = 1) -> str:
    """Returns a table of the mean rewards of both, the guide first."""
    lines = []
    for k, name in enumerate(plain.rows[0]["rewards"]):
        before, after = (_mean([row["rewards"][name] for row in drawn.rows]) for drawn in (plain, guided))
        role = "guides" if k < held_out_from else "held out"
        cells = f"<td>{before:.4g}</td><td>{after:.4g}</td><td>{after - before:+.2g}</td>"
        lines.append(f"<tr><th>{escape(name)}<small>{role}</small></th>{cells}</tr>")
    head = "<tr><th>reward</th><th>unguided</th><th>guided</th><th>change</th></tr>"
    means = f"Means of {len(guided.rows)} images. " if len(guided.rows) > 1 else ""
    said = f"{means}One prompt shows no effect: svdd study compares many, with intervals."
    return f'<table class="svdd-table">{head}{"".join(lines)}</table>{message(said)}'


def costs(plain: Drawn, guided: Drawn) -> str:
    """Returns a table of what an image costs."""
    lines = "".join(
        f"<tr><th>{name}</th><td>{drawn.rows[0]['ledger']['denoiser_rows']:g}</td>"
        f"<td>{drawn.rows[0]['ledger']['decoded_images']:g}</td><td>{drawn.seconds / len(drawn.rows):.2f}</td></tr>"
        for name, drawn in (("unguided", plain), ("guided", guided))
    )
    head = "<tr><th>an image costs</th><th>denoiser rows</th><th>decoded</th><th>seconds</th></tr>"
    return f'<table class="svdd-table">{head}{lines}</table>'


def plot(guided: Drawn) -> str:
    """Returns the values at every selection of the first image and, if the sampler has weights, their sample size."""
    from matplotlib import style
    from matplotlib.figure import Figure

    if not guided.traces or not (trace := guided.traces[0])["step"]:
        return message("This sampler selects nothing, so there are no values to plot.")
    place = list(range(1, len(trace["step"]) + 1))
    rising = all(a < b for a, b in zip(trace["step"], trace["step"][1:], strict=False))
    if rising:
        place = trace["step"]
    sizes = [math.nan if number is None else number for number in trace["ess"]]
    weighted = any(map(math.isfinite, sizes))
    with style.context(["default", {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}]):
        figure = Figure(figsize=(5.6, 4.2 if weighted else 2.6), dpi=110, layout="constrained")
        panels = figure.subplots(2 if weighted else 1, 1, sharex=True, squeeze=False)[:, 0]
        spread = [0 if number is None else number for number in trace["value_std"]]
        low, high = ([m + sign * s for m, s in zip(trace["value_mean"], spread, strict=True)] for sign in (-1, 1))
        panels[0].fill_between(place, low, high, color=_SPREAD, alpha=0.3, linewidth=0, label="mean ± std of all")
        panels[0].plot(place, trace["value_max"], ".", color=_UNGUIDED, label="best")
        panels[0].plot(place, trace["value_chosen"], "-o", markersize=3, color=_GUIDED, label="kept")
        panels[0].set_ylabel("value")
        panels[0].legend(frameon=False, fontsize=8)
        if weighted:
            panels[1].plot(place, sizes, "-o", markersize=3, color=_GUIDED, label="effective sample size")
            panels[1].plot(place, trace["candidates"], ":", color=_UNGUIDED, label="candidates")
            panels[1].set_ylim(bottom=0)
            panels[1].legend(frameon=False, fontsize=8)
            panels[1].set_ylabel("sample size")
        panels[-1].set_xlabel("step" if rising else "selection, in order")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(buffer := io.BytesIO(), format="png")
    last = f"last kept value {trace['value_chosen'][-1]:.4g}"
    return f'<img class="svdd-plot" alt="Values at each step, {last}" src="{_uri(buffer.getvalue())}">'


def _column(drawn: Drawn | None) -> list[str]:
    if drawn is None:
        return []
    kind = "guided" if drawn.guided else "unguided"
    found = []
    for k, (file, row) in enumerate(zip(drawn.files, drawn.rows, strict=True)):
        name, score = next(iter(row["rewards"].items()))
        uri, alt = _uri(file), escape(f"{kind}: {row['prompt']}, seed {row['seed']}")
        caption = f"seed {row['seed']}, {escape(name)} {score:.4g}"
        save = f'<a href="{uri}" download="{kind}-{row["seed"]}-{k}.png">PNG</a>'
        found.append(f'<figure><img src="{uri}" alt="{alt}"><figcaption>{caption} {save}</figcaption></figure>')
    return found


def _preview(frame: Tensor | None) -> str:
    if frame is None:
        return '<figure class="svdd-wait"></figure>'
    Image.fromarray(frame.numpy()).save(buffer := io.BytesIO(), format="JPEG", quality=80)
    uri = _uri(buffer.getvalue(), "jpeg")
    return (
        f'<figure><img class="svdd-preview" src="{uri}" alt="preview"><figcaption>preview of x0</figcaption></figure>'
    )


def _uri(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)
