"""What a long run costs beside its model."""

import os
import tracemalloc
from pathlib import Path

import pytest

from tests.faults.harness import Case


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_prompts(tmp_path):
    def peak(count: int) -> int:
        case = Case(tmp_path / str(count), [f"a picture of the number {k}" for k in range(count)])
        tracemalloc.start()
        assert case.run("--data.batch_size", "50") == 0
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(case.finished()) == count
        return most

    peak(50)  # whatever is imported or cached on first use
    assert peak(1_500) - peak(100) < 1_500 * 600


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(tmp_path):
    case = Case(tmp_path / "case", [f"prompt {k}" for k in range(20)])
    assert case.run() == 0
    before = len(os.listdir("/proc/self/fd"))
    for name in ("one", "two", "three"):
        assert case.run("--output", str(tmp_path / name)) == 0
    assert len(os.listdir("/proc/self/fd")) == before
