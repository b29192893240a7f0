"""The overhead of a long run: memory and open files."""

import gc
import os
import tracemalloc
from pathlib import Path

import pytest

from benchmarks.scale import Peak
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

    peak(50)  # fills imports and caches
    gc.collect()
    gc.freeze()  # the more objects other tests have left, the later garbage is collected
    try:
        assert peak(1_500) - peak(100) < 1_500 * 600
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_resident_memory_and_open_files_stay_flat(tmp_path):

    def peak(name: str, count: int) -> Peak:
        case = Case(tmp_path / name, [f"a picture of the number {k}" for k in range(count)])
        watcher = Peak()
        watcher.start()
        assert case.run("--data.batch_size", "20") == 0
        watcher.stop()
        return watcher

    peak("first", 100)  # fills imports and caches
    few, many = peak("few", 100), peak("many", 1_500)
    assert many.memory - few.memory < 20e6
    assert many.files < few.files + 10


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(tmp_path):
    case = Case(tmp_path / "case", [f"prompt {k}" for k in range(20)])
    assert case.run() == 0
    before = len(os.listdir("/proc/self/fd"))
    for name in ("one", "two", "three"):
        assert case.run("--output", str(tmp_path / name)) == 0
    assert len(os.listdir("/proc/self/fd")) == before
