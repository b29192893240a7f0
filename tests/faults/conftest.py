"""Reference runs, and the check that the table of faults in docs/how_to/many_gpus.md matches the test results."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import REPOSITORY, Case, end_all

PAGE = REPOSITORY / "docs" / "how_to" / "many_gpus.md"
PROMPTS = [f"prompt {k}" for k in range(4)] + ["wait here", "wait there"] + [f"prompt {k}" for k in range(6, 11)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Case:
    """An undisturbed run."""
    case = Case(tmp_path_factory.mktemp("whole"), PROMPTS)
    case.resume()
    return case


@pytest.fixture
def case(tmp_path) -> Case:
    """The same run, to be disturbed."""
    return Case(tmp_path / "case", PROMPTS)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kills processes left by a failed test; pytest would wait for them."""
    yield
    end_all()


@pytest.fixture(scope="session")
def table() -> Iterator[Callable[[str, str, int, int], None]]:
    """Checks a row of docs/how_to/many_gpus.md: fault, outcome, exit code, number of finished images lost.

    With SVDD_WRITE_FAULTS=1 all rows are written there instead.
    """
    rows: list[str] = []
    write = os.environ.get("SVDD_WRITE_FAULTS") == "1"

    def record(fault: str, happened: str, code: int, lost: int) -> None:
        row = f"| {fault} | {happened} | {code} | {lost} |"
        rows.append(row)
        assert write or row in PAGE.read_text().splitlines(), (
            f"write docs/how_to/many_gpus.md anew, with SVDD_WRITE_FAULTS=1: {row}"
        )

    yield record
    if write:
        write_table(PAGE, rows)


def write_table(page: Path, rows: list[str]) -> None:
    head, _, rest = page.read_text().partition("<!-- faults -->\n")
    _, _, tail = rest.partition("<!-- end of faults -->")
    lines = ["| fault | what happened | exit code | images lost |", "|---|---|---|---|", *dict.fromkeys(rows)]
    page.write_text(f"{head}<!-- faults -->\n" + "\n".join(lines) + f"\n<!-- end of faults -->{tail}")
