"""Tables as text, markdown, LaTeX and csv."""

import csv
import doctest
import io
import re

import pytest

import svdd.evaluation.rendering as rendering
from svdd.evaluation.rendering import Bold, render

NAME = 'a_b & 50% $x$ {y} #1 ~ ^ \\ <b> | "q" *x* _y_ [z](u)'
HEADERS = ["run", "mean | m", "interval", "number", "nothing"]
ROWS = [
    [NAME, Bold("-0.5 ± 0.1"), "[-0.3, +0.2]", 1.23456789012, None],
    ["[0]\x1b[31m\nb\u202e", "2.0 ± 0.1", None, float("nan"), None],
]


def test_the_example_runs():
    assert doctest.testmod(rendering) == (0, 1)


def test_latex_has_the_rules_of_booktabs_and_escapes_what_has_a_meaning():
    lines = render(HEADERS, ROWS, "tex").splitlines()
    assert [line for line in lines if line.startswith("\\")] == [
        r"\begin{tabular}{lrrrl}",
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    body = [re.split(r"(?<!\\)&", line) for line in lines if line.endswith(r"\\")]
    assert [len(cells) for cells in body] == [5, 5, 5]
    bare = re.sub(r"\\text\w+(?={)|\\[&%$#_{}]|\$\\pm\$|\$-\$|\\\\$|[{}]", "", "&".join(body[1]))
    assert not re.search(r"[%$#_^~\\<>|]", bare), bare  # what is left has no meaning in LaTeX
    assert body[1][0].count("{") == body[1][0].count("}")
    assert body[1][1].strip() == r"\textbf{$-$0.5 $\pm$ 0.1}"
    assert body[1][2].strip() == "[$-$0.3, +0.2]"
    assert body[2][0].strip().startswith("{}[0]")  # after \\ a bracket would be its argument


def test_markdown_keeps_a_name_in_its_cell():
    head, rule, *body = render(HEADERS, ROWS, "md").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, rule, *body)]
    assert [len(row) for row in cells] == [5, 5, 5, 5]
    assert [cell.strip("-") for cell in cells[1]] == [":", ":", ":", ":", ":"]
    assert cells[1][1].endswith("-:")
    assert re.sub(r"\\(.)", r"\1", cells[2][0].replace("\\\\", "\0")).replace("\0", "\\").strip() == NAME
    assert r"\*x\* \_y\_ [z\](u)" in cells[2][0]
    assert cells[2][1].strip() == "**-0.5 ± 0.1**"
    assert "a_b" in cells[2][0]  # an underscore within a word is no emphasis


def test_csv_holds_whole_numbers_and_every_name_as_it_is():
    head, first, second = csv.reader(io.StringIO(render(HEADERS, ROWS, "csv")))
    assert head == HEADERS
    assert first == [NAME, "-0.5 ± 0.1", "[-0.3, +0.2]", "1.23456789012", ""]
    assert second[2:] == ["", "", ""]


@pytest.mark.parametrize("form", ["text", "md", "tex", "csv"])
def test_control_characters_are_escaped_and_a_row_is_a_line(form):
    table = render(HEADERS, ROWS, form)
    assert not re.search("[\0-\x09\x0b-\x1f\u202e]", table)
    assert table.endswith("\n")
    assert "nan" not in table
    empty = render(HEADERS, [], form)
    assert all(word in empty for word in ("run", "interval", "number"))
