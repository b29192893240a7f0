"""The overhead of a long run: memory and open files."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from benchmarks.scale import Peak
from tests.faults.harness import Case
from tests.memory import peak_bytes


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_prompts(tmp_path):
    def run(count: int) -> None:
        case = Case(Path(tempfile.mkdtemp(dir=tmp_path)), [f"a picture of the number {k}" for k in range(count)])
        assert case.run("--data.batch_size", "50") == 0
        assert len(os.listdir(case.folder / "images")) == count

    run(50)  # fills imports and caches
    gc.collect()
    gc.freeze()  # the more objects other tests have left, the later garbage is collected
    try:
        assert peak_bytes(lambda: run(1_500)) - peak_bytes(lambda: run(100)) < 1_500 * 600
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_resident_memory_and_open_files_stay_flat(tmp_path):

    def peak(count: int) -> Peak:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        case = Case(folder, [f"a picture of the number {k}" for k in range(count)])
        watcher = Peak()
        watcher.start()
        assert case.run("--data.batch_size", "20") == 0
        watcher.stop()
        return watcher

    def flat() -> bool:
        few, many = peak(100), peak(1_500)
        return many.memory - few.memory < 20e6 and many.files < few.files + 10

    peak(100)  # fills imports and caches
    assert flat() or flat()  # the interpreter's own tables may double once


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(tmp_path):
    case = Case(tmp_path / "case", [f"prompt {k}" for k in range(20)])
    assert case.run() == 0
    before = len(os.listdir("/proc/self/fd"))
    for name in ("one", "two", "three"):
        assert case.run("--output", str(tmp_path / name)) == 0
    assert len(os.listdir("/proc/self/fd")) == before
