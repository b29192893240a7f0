"""Several processes on one run: the images and statistics are the same, and a fault in one process ends all."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Case, listens, until

SEVERAL = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (2, 3)])
def test_any_number_of_processes_gives_the_same_run(tmp_path, count: int, ranks: int):
    """Uneven shares, and fewer prompts than processes."""
    prompts = [f"prompt {k}" for k in range(count)]
    one, several = Case(tmp_path / "one", prompts), Case(tmp_path / "several", prompts)
    one.resume("--data.batch_size", "1")
    processes = several.fork_ranks(ranks, "--data.batch_size", "1")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * ranks, several.said()[-3000:]
    assert several.content() == one.content()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(case: Case, whole: Case, table: Callable, rank: int):
    """Rank 0, which holds the store, exits only after the other rank has read the stop request."""
    processes = case.fork_tasks(*SEVERAL)
    case.waiting(2)
    before = case.finished()
    os.kill(processes[rank].pid, signal.SIGTERM)
    case.gate.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143], case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM to one task of two under SLURM", "both finished their batch", 143, lost)


def test_a_process_that_hangs(case: Case, whole: Case, table: Callable):
    processes = case.fork_ranks(2, "--patience", "1")
    case.waiting(2)
    before = case.finished()
    os.kill(processes[1].pid, signal.SIGSTOP)
    case.gate.touch()
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert "svdd: no process has finished a batch for 1 s" in case.said()
    processes[1].kill()
    processes[1].join()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGSTOP of one of two processes", "the other drew its share, and ended after --patience", 1, lost)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails(tmp_path, table: Callable, failing: int):
    """Under SLURM no agent supervises the processes: each detects the failure of the other."""
    prompts = [f"prompt {k}" for k in range(6)]
    prompts[2 + failing] = "wait for the bad one"
    case, whole = Case(tmp_path / "case", prompts), Case(tmp_path / "whole", prompts)
    whole.resume("--data.batch_size", "1")
    processes = case.fork_tasks(*SEVERAL, "--data.batch_size", "1", environment={"STUB_BAD": "bad"})
    case.waiting(1)
    before = case.finished()
    case.gate.touch()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    assert codes == [2 if rank == failing else 1 for rank in range(2)], case.said()
    assert "svdd: error: reward StubReward failed with RuntimeError: no score for bad" in case.said()
    assert {Path(file).name for file in re.findall('File "([^"]+)"', case.said())} == {"stub.py"}  # no library's lines
    finished = case.finished()
    assert f"images/{failing:06d}-00.png" in finished
    assert f"images/{2 + failing:06d}-00.png" not in finished
    lost = case.resume("--data.batch_size", "1", before=before)
    assert case.content() == whole.content()
    table("an error in one task of two under SLURM", "the other ended with 1", 2, lost)


def test_wrong_devices_under_torchrun(case: Case, whole: Case, table: Callable):
    def start() -> list[int | None]:
        processes = case.fork_ranks(2, devices=1)
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    assert start() == [2, 2]
    assert "torchrun started 2 processes, but trainer.devices=1 and trainer.num_nodes=1 stand for 1" in case.said()
    assert not case.folder.exists()
    case.resume()
    before = case.finished()
    assert start() == [2, 2]
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("wrong devices under torchrun", "refused before anything was read", 2, lost)


def test_the_processes_that_slurm_starts(case: Case, whole: Case):
    case.gate.touch()

    def start(*options: str) -> list[int | None]:
        processes = case.fork_tasks(*options)
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    assert start() == [2, 2]
    assert "SLURM started 2 processes, but trainer.devices=1" in case.said()
    assert start(*SEVERAL) == [0, 0], case.said()[-3000:]
    assert case.content() == whole.content()


def test_a_signal_to_a_process_that_waits_for_another(case: Case, whole: Case, table: Callable):
    """The process blocks in native code, where Python runs no signal handlers."""
    processes = case.fork_ranks(2)
    os.kill(processes[1].pid, signal.SIGSTOP)
    until(lambda: listens(case.port))
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(60)
    assert processes[0].exitcode == 143, case.said()
    processes[1].kill()
    processes[1].join()
    lost = case.resume()
    assert case.content() == whole.content()
    table("SIGTERM before the processes have met", "ended at once", 143, lost)
