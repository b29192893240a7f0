"""Runs started by svdd's own agent and by torchrun end with the documented exit code and leave no process behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.faults.harness import REPOSITORY, Case, free_port, until

pytestmark = pytest.mark.slow

TWO = ("--trainer.devices", "2")


def end(case: Case, command: BaseProcess) -> int | None:
    """Waits for the command and its child processes to end; returns the exit code."""
    command.join(60)
    until(lambda: not case.pids())
    return command.exitcode


def ranks(case: Case) -> dict[int, int]:
    """Returns the process id of each rank once both block on a prompt that waits."""
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in case.waiting(2)}
    return {int(word[5:]): pid for pid, words in environments.items() for word in words if word.startswith(b"RANK=")}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command(case: Case, whole: Case, table: Callable, number: int, code: int):
    """SIGTERM goes to the parent alone, SIGINT to the whole process group, as from a terminal."""
    command = case.fork(*TWO)
    case.waiting(2)
    before = case.finished()
    (os.kill if number == signal.SIGTERM else os.killpg)(command.pid, number)
    name = signal.Signals(number).name
    until(lambda: f"svdd: {name}: the current batch is finished first" in case.said())
    case.gate.touch()
    assert end(case, command) == code, case.said()
    assert len(case.finished()) == 8  # two batches of each
    assert "Traceback" not in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table(f"{name}, two devices", "both finished their batch, no process left", code, lost)


def test_a_second_interrupt_ends_all_at_once(case: Case, whole: Case, table: Callable):
    command = case.fork(*TWO)
    case.waiting(2)
    before = case.finished()
    os.killpg(command.pid, signal.SIGINT)
    until(lambda: "once more ends it at once" in case.said())
    os.killpg(command.pid, signal.SIGINT)
    assert end(case, command) == 130
    assert case.finished() == before
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGINT twice, two devices", "all ended at once, no process left", 130, lost)


def test_a_signal_to_a_started_process(case: Case, whole: Case, table: Callable):
    """A signal is not a failure: no process restarts."""
    command = case.fork(*TWO, "--max_restarts", "1")
    pids = ranks(case)
    before = case.finished()
    os.kill(pids[1], signal.SIGTERM)
    case.gate.touch()
    assert end(case, command) == 143, case.said()
    assert "svdd: ended: SIGTERM to process" in case.said()
    assert len(case.finished()) >= 8
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM to one of two processes", "both finished their batch, no process left", 143, lost)


def test_a_killed_process_ends_the_other(case: Case, whole: Case, table: Callable):
    command = case.fork(*TWO)
    pids = ranks(case)
    before = case.finished()
    os.kill(pids[1], signal.SIGKILL)
    case.gate.touch()
    assert end(case, command) == 1, case.said()
    assert "svdd: process 1 was killed by SIGKILL" in case.said()
    assert "Traceback" not in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGKILL of one of two processes", "the other finished its batch, no process left", 1, lost)


def test_a_killed_process_restarts(case: Case, whole: Case, table: Callable):
    command = case.fork(*TWO, "--max_restarts", "1")
    pids = ranks(case)
    before = case.finished()
    os.kill(pids[0], signal.SIGKILL)
    case.gate.touch()
    assert end(case, command) == 0, case.said()
    assert "svdd: restart 1 of 1" in case.said()
    after = case.finished()
    lost = sum(after.get(name) != entry for name, entry in before.items())
    assert case.content() == whole.content()
    table("SIGKILL of one of two processes, --max_restarts 1", "both started again and finished the run", 0, lost)


def test_a_killed_command_ends_its_processes(case: Case, whole: Case, table: Callable):
    command = case.fork(*TWO)
    case.waiting(2)
    before = case.finished()
    command.kill()
    assert end(case, command) == -signal.SIGKILL
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGKILL of the command, two devices", "both processes ended at once", 137, lost)


def test_an_error_is_reported_once(case: Case, whole: Case, table: Callable):
    """An error in a reward causes no restart. The gate holds both ranks until the failing prompt."""
    command = case.fork(*TWO, "--max_restarts", "2", environment={"STUB_BAD": "there"})
    case.waiting(2)
    before = case.finished()
    case.gate.touch()
    assert end(case, command) == 2, case.said()
    assert case.said().endswith("\nsvdd: error: reward StubReward failed with RuntimeError: no score for there\n")
    assert case.said().count("Traceback") == 1  # of the reward's own lines
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("an error in one of two processes", "the other finished its batch; one message", 2, lost)


def test_settings_of_another_run(case: Case, whole: Case, table: Callable):
    """Rank 0 refuses different settings while the other rank waits."""
    case.resume()
    before = case.finished()
    command = case.fork(*TWO, "--model.seed", "5")
    assert end(case, command) == 2
    assert case.said().count("\n") == 5  # four lines of the first run
    assert "holds a run with other settings: model.seed was 0, now 5" in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("settings of another run, two devices", "refused with one message", 2, lost)


@pytest.mark.parametrize("restarts", [0, 1])
def test_two_machines(case: Case, whole: Case, table: Callable, restarts: int):
    """Two agents on one host, each with one process."""
    port = free_port()
    nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp")
    agents = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    if restarts:
        agents += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "1"]
    else:
        agents += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents += ["--max-restarts", str(restarts)]
    commands = [case.start(*nodes, launcher=(*agents, "--node-rank", str(rank), "-m", "svdd")) for rank in range(2)]
    pids = ranks(case)
    before = case.finished()
    os.kill(pids[1], signal.SIGKILL)
    case.gate.touch()
    for command in commands:
        command.wait(60)
    until(lambda: not case.pids())
    assert [command.returncode for command in commands] == ([0, 0] if restarts else [1, 1]), case.said()[-3000:]
    if restarts:
        after = case.finished()
        lost = sum(after.get(name) != entry for name, entry in before.items())
        what = "all processes started again and finished the run"
    else:
        assert "svdd: process 1 has died" in case.said()
        lost = case.resume(before=before)
        what = "the other finished its batch, no process left"
    assert case.content() == whole.content()
    options = f"torchrun --max-restarts {restarts}"
    table(f"SIGKILL of a process on one of two machines, {options}", what, 0 if restarts else 1, lost)


@pytest.mark.parametrize("command", ["predict", "fit", "calibrate", "score"])
def test_an_interrupt_while_libraries_are_imported(tmp_path, command: str):
    words = ["--reward", "Brightness", "--images", "."] if command == "score" else ["--output", str(tmp_path / "out")]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "svdd", command, *words],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert (tmp_path / "log").read_text() == "svdd: ended: SIGINT\n"
