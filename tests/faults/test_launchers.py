"""Runs as a user starts them, by Lightning's launcher and by torchrun: nobody hangs and nobody is left behind."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.harness import Case, free_port, until

pytestmark = pytest.mark.slow

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def test_sigterm_reaches_the_started_processes(case: Case, whole: Case, table: Callable):
    command = case.start(*TWO)
    case.waiting(2)
    before = case.finished()
    os.kill(command.pid, signal.SIGTERM)
    case.gate.touch()
    command.wait(60)
    until(lambda: not case.pids())
    assert command.returncode == 143
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM to a run on two devices", "both finished their batch, exit code 143, no process left", lost)


def test_a_second_interrupt_reaches_the_started_processes(case: Case, whole: Case, table: Callable):
    command = case.start(*TWO)
    case.waiting(2)
    before = case.finished()
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does
    until(lambda: "once more ends it at once" in case.said())
    os.killpg(command.pid, signal.SIGINT)
    command.wait(60)
    until(lambda: not case.pids())
    assert command.returncode == 130
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGINT twice to a run on two devices", "both ended at once, exit code 130, no process left", lost)


def test_a_finished_run_is_repeated(case: Case, whole: Case, table: Callable):
    case.resume()
    before = case.finished()
    command = case.start(*TWO)
    command.wait(120)
    assert command.returncode == 0, case.said()[-3000:]
    until(lambda: not case.pids())
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("the same command once more, two devices", "nothing was drawn, exit code 0", lost)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_takes_the_others_along(case: Case, whole: Case, table: Callable, killed: int):
    command = case.start(*TWO)
    pids = {pid != command.pid: pid for pid in case.waiting(2)}
    before = case.finished()
    os.kill(pids[killed], signal.SIGKILL)
    case.gate.touch()
    command.wait(60)
    until(lambda: not case.pids())
    assert command.returncode == (-signal.SIGKILL if killed == 0 else 1)
    reason = (
        "process 1 of this machine was killed by SIGKILL" if killed else "the process that started this one is gone"
    )
    assert f"svdd: ended: {reason}" in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    what = "the child" if killed else "rank 0"
    how = "finished its batch, exit code 1" if killed else "ended at once"
    table(f"SIGKILL of {what}, two devices", f"the other {how}, no process left", lost)


def test_two_nodes_by_torchrun(case: Case, whole: Case):
    case.gate.touch()
    rendezvous = (
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    )
    nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp")
    commands = [
        case.start(
            *nodes, launcher=("-m", "torch.distributed.run", *rendezvous, "--node-rank", str(rank), "-m", "svdd")
        )
        for rank in range(2)
    ]
    for command in commands:
        command.wait(120)
    assert [command.returncode for command in commands] == [0, 0], case.said()[-3000:]
    until(lambda: not case.pids())
    assert case.content() == whole.content()
