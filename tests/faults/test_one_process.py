"""What may happen to a run of one process: signals, kills, a full disk, too little memory, a reward that fails."""

import os
import random
import signal
from collections.abc import Callable

import pytest

from tests.faults.harness import Case

KEPT = "finished images are kept, and the same command continues"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_batch(case: Case, whole: Case, table: Callable, number: int, code: int):
    process = case.fork()
    assert case.waiting(1) == [process.pid]
    os.kill(process.pid, number)
    case.gate.touch()
    process.join(60)
    assert process.exitcode == code
    assert len(case.finished()) == 6  # two batches, and the one at work
    name = signal.Signals(number).name
    assert f"svdd: {name}: the batch at work is finished first" in case.said()
    assert f"svdd: ended: {name}; {KEPT}" in case.said()
    lost = case.resume()
    assert case.content() == whole.content()
    table(f"{name} once", f"the batch at work was finished, exit code {process.exitcode}", lost)


def test_a_second_interrupt_does_not_wait(case: Case, whole: Case, table: Callable):
    process = case.fork()
    case.waiting(1)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert len(case.finished()) == 4
    lost = case.resume()
    assert case.content() == whole.content()
    table("SIGINT twice", f"ended at once, exit code {process.exitcode}; the batch at work was drawn again", lost)


def test_a_signal_before_the_first_batch(case: Case, whole: Case):
    process = case.fork("--data.batch_size", "99")
    case.waiting(1)
    os.kill(process.pid, signal.SIGTERM)
    case.gate.touch()
    process.join(60)
    assert process.exitcode == 143
    assert len(case.finished()) == 11  # the run was through, but for the last step
    assert not (case.folder / "summary.json").exists()
    assert case.resume() == 0
    assert case.content() == whole.content()


def test_twenty_kills_at_random_moments(tmp_path, table: Callable):
    prompts = [f"prompt {k}" for k in range(100)]
    whole, case = Case(tmp_path / "whole", prompts), Case(tmp_path / "case", prompts)
    whole.resume()
    moments = random.Random(0)
    lost, kills, seen, progress = 0, 0, {}, set()
    while kills < 20:
        process = case.fork()
        process.join(moments.uniform(0.05, 0.7))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        finished = case.finished()
        lost += sum(finished.get(name) != entry for name, entry in seen.items())
        seen = finished
        progress.add(len(finished))
    lost += case.resume()
    assert len(progress) >= 5, "the moments do not lie within the run"
    assert case.content() == whole.content()
    table(f"SIGKILL at {kills} random moments", "the batch at work was drawn again each time", lost)
