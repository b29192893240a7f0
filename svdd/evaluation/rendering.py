"""Tables as text for terminals, GitHub markdown, LaTeX (booktabs) and csv."""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Literal

from tabulate import DataRow, Line, TableFormat, tabulate

from svdd import printable

__all__ = ["Bold", "Cell", "Form", "render", "shown"]

Form = Literal["text", "md", "csv", "tex"]
Cell = str | float | None

_NUMBER = re.compile(r"[-+\u2212±\[(]*\.?\d.*")
_TEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "\u00d7": r"$\times$", "\u2212": "$-$"}
)
# What markdown would take for emphasis, code, a tag, a link or the end of a cell; an underscore within a word is none.
_MARKDOWN = re.compile(r"[\\|*`<~]|(?<!\w)_|_(?!\w)|\](?=[\[(:])")


class Bold(str):
    """A cell that markdown and LaTeX show in bold."""

    __slots__ = ()


def render(headers: Sequence[str], rows: Sequence[Sequence[Cell]], form: Form) -> str:
    """Returns a table, with an end of line after its last.

    A cell on several lines is joined to one, and its control characters are escaped. None is a blank; so is a number
    that is not finite. csv shows numbers in full, the others with six digits: pass strings for any other format.
    A column of numbers is aligned on the right.

    Args:
        headers: The columns' names.
        rows: A cell for each column.
        form: `text` for a terminal, `md` for GitHub, `tex` for LaTeX with the package booktabs, `csv`.

    Examples:
        >>> print(render(["run", "mean"], [["SVDD_pm", "0.50"], ["unguided", None]], "md"), end="")
        | run      |   mean |
        |:---------|-------:|
        | SVDD_pm  |   0.50 |
        | unguided |        |
    """
    if form == "csv":
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([_plain(cell, full=True) for cell in row] for row in (headers, *rows))
        return file.getvalue()
    alignment = ["right" if _is_numeric([row[k] for row in rows]) else "left" for k in range(len(headers))]
    style: str | TableFormat = {"text": "simple", "md": "pipe"}.get(form) or _booktabs(alignment)
    names, *table = [[shown(cell, form) for cell in row] for row in (headers, *(rows or [[None] * len(headers)]))]
    if form == "tex":  # where \\ would take a bracket or a star for its argument
        table = [[re.sub(r"^(?=[\[*])", "{}", first), *others] for first, *others in table]
    text = tabulate(table, names, style, disable_numparse=True, colalign=alignment, missingval="")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _is_numeric(cells: Sequence[Cell]) -> bool:
    known = [cell for cell in cells if cell is not None and cell != ""]
    return bool(known) and all(not isinstance(cell, str) or _NUMBER.fullmatch(cell) for cell in known)


def _plain(cell: Cell, full: bool = False) -> str:
    """Returns a cell as text on one line."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, str):
        return " ".join(printable(cell).split())
    return repr(cell) if full or isinstance(cell, int) else f"{cell:.6g}"


def shown(cell: Cell, form: Form) -> str:
    """Returns a cell, or other text on one line, with what has a meaning in a form escaped, and in bold if it is."""
    text = _plain(cell)
    if form == "md":
        text = _MARKDOWN.sub(lambda match: f"\\{match[0]}", text)
    elif form == "tex":
        text = re.sub(r"(?<![\w.])-(?=[\d.])", "\u2212", text).translate(_TEX)
    if not isinstance(cell, Bold) or not text or form == "text":
        return text
    return f"**{text}**" if form == "md" else rf"\textbf{{{text}}}"


def _booktabs(alignment: Sequence[str]) -> TableFormat:
    columns = "".join(side[0] for side in alignment)
    return TableFormat(
        lineabove=Line(rf"\begin{{tabular}}{{{columns}}}" + "\n" + r"\toprule", "", "", ""),
        linebelowheader=Line(r"\midrule", "", "", ""),
        linebetweenrows=None,
        linebelow=Line(r"\bottomrule" + "\n" + r"\end{tabular}", "", "", ""),
        headerrow=DataRow("", "&", r"\\"),
        datarow=DataRow("", "&", r"\\"),
        padding=1,
        with_header_hide=None,
    )
