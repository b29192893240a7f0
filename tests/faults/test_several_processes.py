"""Several processes on one run: the same images and statistics, and an end in order whatever happens to one of them."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.harness import Case, listens, until


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


def test_all_processes_stop_when_one_is_told_to(case: Case, whole: Case, table: Callable):
    """The word goes through the run folder, so it reaches other machines too."""
    processes = case.fork_ranks(2)
    told = case.waiting(2)[1]
    before = case.finished()
    os.kill(told, signal.SIGTERM)
    case.gate.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM to one process of two", "both finished their batch, exit code 143", lost)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process(case: Case, whole: Case, table: Callable, stopped: int):
    processes = case.fork_ranks(2, "--patience", "4")
    case.waiting(2)
    before = case.finished()
    os.kill(processes[stopped].pid, signal.SIGSTOP)
    case.gate.touch()
    other = processes[1 - stopped]
    other.join(60)
    assert other.exitcode == 1
    assert f"process {stopped} has given no sign of life for 4 s" in case.said()
    os.kill(processes[stopped].pid, signal.SIGCONT)
    processes[stopped].join(60)
    assert processes[stopped].exitcode == 1
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table(f"SIGSTOP of process {stopped} of two", "the other ended after its patience, exit code 1", lost)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails(tmp_path, table: Callable, failing: int):
    prompts = [f"prompt {k}" for k in range(6)]
    prompts[2 + failing] = "wait for the bad one"
    case, whole = Case(tmp_path / "case", prompts), Case(tmp_path / "whole", prompts)
    whole.resume("--data.batch_size", "1")
    processes = case.fork_ranks(2, "--data.batch_size", "1", environment={"STUB_BAD": "bad"})
    case.waiting(1)
    before = case.finished()
    case.gate.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2 if rank == failing else 1 for rank in range(2)]
    assert f"process {failing} failed, see its message" in case.said()
    assert "svdd: error: reward Brightness failed with RuntimeError: no score for bad" in case.said()
    finished = case.finished()
    assert f"images/{failing:06d}-00.png" in finished
    assert f"images/{2 + failing:06d}-00.png" not in finished
    lost = case.resume("--data.batch_size", "1", before=before)
    assert case.content() == whole.content()
    table(f"an error in process {failing} of two", "the other ended with it, exit code 1", lost)


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
    table("wrong devices under torchrun", "refused before anything was read, exit code 2", lost)


SEVERAL = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


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


def test_a_process_that_fails_before_the_others_meet_it(case: Case, whole: Case, table: Callable):
    """Rank 0 refuses the settings, and the other waits for it outside of Python."""
    case.resume()
    before = case.finished()
    processes = case.fork_tasks(*SEVERAL, "--model.seed", "5")
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 1]
    assert "process 0 failed, see its message" in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("settings of another run, two processes", "refused with exit code 2; the other ended, exit code 1", lost)


def test_a_signal_to_a_process_that_waits_for_another(case: Case, whole: Case, table: Callable):
    processes = case.fork_ranks(2, "--patience", "2")
    os.kill(processes[1].pid, signal.SIGSTOP)
    until(lambda: listens(case.port))
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(60)
    os.kill(processes[1].pid, signal.SIGCONT)
    processes[1].join(60)
    assert [process.exitcode for process in processes] == [143, 143], case.said()[-3000:]
    lost = case.resume()
    assert case.content() == whole.content()
    table(
        "SIGTERM before the processes have met",
        "the one that waited ended in seconds, the other after its patience, exit code 143",
        lost,
    )
