"""Faults in a run of one process: signals, kills, a full disk, too little memory, a failing reward."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svdd.diffusion.memory import in_units
from svdd.evaluation.evaluation import Evaluation
from svdd.runs.files import write_atomically
from tests.faults.conftest import PROMPTS
from tests.faults.harness import REPOSITORY, Case, until

KEPT = "what is finished is kept, and the same command continues"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_batch(case: Case, whole: Case, table: Callable, number: int, code: int):
    process = case.fork()
    assert case.waiting(1) == [process.pid]
    before = case.finished()
    os.kill(process.pid, number)
    case.gate.touch()
    process.join(60)
    assert process.exitcode == code
    assert len(case.finished()) == 6  # two batches and the current one
    name = signal.Signals(number).name
    assert f"svdd: {name}: the current batch is finished first" in case.said()
    assert f"svdd: ended: {name}; {KEPT}" in case.said()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table(f"{name} once", "the current batch was finished", code, lost)


def test_a_second_interrupt_does_not_wait(case: Case, whole: Case, table: Callable):
    process = case.fork()
    case.waiting(1)
    before = case.finished()
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "once more ends it at once" in case.said())
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert len(case.finished()) == 4
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGINT twice", "ended at once; the current batch was drawn again", 130, lost)


def test_a_second_sigterm_does_not_wait(case: Case, whole: Case, table: Callable):
    process = case.fork()
    case.waiting(1)
    before = case.finished()
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # at once, as from a launcher that forwards it: the same request
    until(lambda: "SIGTERM: the current batch is finished first" in case.said())
    process.join(0.6)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert len(case.finished()) == 4
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM twice", "ended at once; the current batch was drawn again", 143, lost)


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_a_step_that_hangs(case: Case, whole: Case, table: Callable, native: bool, monkeypatch):
    """In Python the line is named; native code that blocks the interpreter is ended too."""
    monkeypatch.setattr("svdd.runs.processes.watchdog._MARGIN", 0.2)
    process = case.fork("--step_timeout", "0.8", environment={"STUB_BLOCKS": "1"} if native else None)
    process.join(60)
    assert process.exitcode == 1
    before = case.finished()
    assert len(before) == 4
    assert native or "svdd: error: no step was finished within 0.8 s (step_timeout); " in case.said()
    assert "stub.py" in case.said()
    lost = case.resume("--step_timeout", "60", before=before)
    assert case.content() == whole.content()
    table("a step that hangs, --step_timeout", "the process was ended, with the line that it ran", 1, lost)


def test_a_writer_that_hangs(case: Case, whole: Case, table: Callable, monkeypatch):
    """As on a network disk: the next batch is drawn, and then the line of the writer is named."""

    def write(path: Path, *arguments: object, **options: object) -> None:
        until(lambda: "000004" not in path.name)
        write_atomically(path, *arguments, **options)

    case.gate.touch()
    with monkeypatch.context() as patch:
        patch.setattr("svdd.runs.images.write_atomically", write)
        process = case.fork("--step_timeout", "0.8")
        process.join(60)
    assert process.exitcode == 1
    before = case.finished()
    assert len(before) == 4
    assert "svdd: error: no step was finished within 0.8 s (step_timeout); " in case.said()
    assert "harness.py" in case.said()  # where `until` waits
    lost = case.resume("--step_timeout", "60", before=before)
    assert case.content() == whole.content()
    table("a disk that hangs, --step_timeout", "the process was ended, with the line that it ran", 1, lost)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_workers_too(case: Case, whole: Case, table: Callable, number: int, code: int):
    """The signal reaches data-loader workers too, as from a terminal or SLURM."""
    process = case.fork("--data.num_workers", "1")
    case.waiting(1)
    before = case.finished()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    for pid in (*map(int, workers), process.pid):
        os.kill(pid, number)
    case.gate.touch()
    process.join(60)
    assert process.exitcode == code, case.said()[-3000:]
    assert len(case.finished()) == 6
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    name = signal.Signals(number).name
    table(f"{name} to the workers that read prompts too", "the current batch was finished", code, lost)


def test_a_signal_in_the_only_batch(case: Case, whole: Case):
    process = case.fork("--data.batch_size", "99")
    case.waiting(1)
    os.kill(process.pid, signal.SIGTERM)
    case.gate.touch()
    process.join(60)
    assert process.exitcode == 143
    assert len(case.finished()) == 11  # all images were drawn; only the final step was missing
    assert not (case.folder / "summary.json").exists()
    assert case.resume() == 0
    assert case.content() == whole.content()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, table: Callable):
    prompts = [f"prompt {k}" for k in range(1500)]  # more than any machine draws between the kills
    whole, case = Case(tmp_path / "whole", prompts), Case(tmp_path / "case", prompts)
    whole.resume()
    moments = random.Random(0)
    lost, kills, seen, progress = 0, 0, {}, set()
    while kills < 20:
        process = case.fork()
        if kills % 4:  # most while it draws, the others during start-up
            until(lambda: len(case.finished()) > len(seen))  # noqa: B023
        seen = case.finished()
        process.join(moments.uniform(0, 0.05 if kills % 4 else 0.5))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        finished = case.finished()
        lost += sum(finished.get(name) != entry for name, entry in seen.items())
        seen = finished
        progress.add(len(finished))
    lost += case.resume()
    assert len(progress) >= 5, "the kills did not fall within the run"
    assert case.content() == whole.content()
    table(f"SIGKILL at {kills} random moments", "the current batch was drawn again each time", 137, lost)


@pytest.mark.slow
def test_kills_while_shards_are_written(tmp_path, table: Callable):
    prompts = [f"prompt {k}" for k in range(400)]
    whole, case = Case(tmp_path / "whole", prompts), Case(tmp_path / "case", prompts)
    whole.resume()
    moments = random.Random(1)
    lost, seen = 0, {}
    for _ in range(4):
        process = case.fork("--tar", "true")
        until(lambda: len(case.finished()) > len(seen))  # noqa: B023
        seen = case.finished()
        process.join(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        finished = case.finished()
        lost += sum(finished.get(name) != entry for name, entry in seen.items())
        seen = finished
    lost += case.resume("--tar", "true")
    assert case.content() == whole.content()
    assert len(whole.content()[0]) == 400
    assert len(list(case.folder.glob("images/*.tar"))) > 1
    table("SIGKILL while tar shards are written", "torn ends were dropped, new shards begun", 137, lost)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_kill_while_an_old_run_is_overwritten(case: Case, whole: Case, tmp_path: Path, share: float):
    """At a share of the file operations; the old run has more pictures and other settings."""
    old = Case(case.folder.parent, [f"old {k}" for k in range(20)])
    assert old.resume("--model.seed", "5") == 0
    case = Case(case.folder.parent, PROMPTS)
    case.gate.touch()
    process = case.fork("--overwrite", "true", operations=round(share * 170))
    process.join(60)
    assert process.exitcode == 137
    assert case.resume("--overwrite", "true", before={}) == 0
    assert case.content() == whole.content()


def test_a_restart_by_a_launcher_does_not_overwrite_again(case: Case, whole: Case):
    process = case.fork("--overwrite", "true")
    case.waiting(1)
    process.kill()
    process.join()
    before = case.finished()
    assert len(before) == 4
    case.gate.touch()
    (process,) = case.fork_ranks(1, "--overwrite", "true", environment={"TORCHELASTIC_RESTART_COUNT": "1"})
    process.join(60)
    assert process.exitcode == 0, case.said()
    assert before.items() <= case.finished().items()
    assert case.content() == whole.content()


def test_single_variables_of_launchers_are_ignored(case: Case):
    """With NODE_RANK=1 a finished run was drawn over with other settings, as no lock was taken."""
    case.resume()
    before = case.finished()
    names = ["RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    names += ["SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "JSM_NAMESPACE_RANK", "SVDD_AGENT"]
    environment = {**os.environ, **dict.fromkeys(names, "garbage"), "NODE_RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "svdd", *case.words("--model.seed", "5")]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds a run with other settings: model.seed was 0, now 5" in done.stderr
    assert done.stderr.count("\n") == 1
    assert case.finished() == before


BAD = {"STUB_BAD": "there"}


def test_a_reward_that_fails_on_one_prompt(case: Case, whole: Case, table: Callable):
    case.gate.touch()
    process = case.fork(environment=BAD)
    process.join(60)
    assert process.exitcode == 2
    assert "svdd: error: reward StubReward failed with RuntimeError: no score for there" in case.said()
    before = case.finished()
    process = case.fork("--model.on_error", "skip", environment=BAD)
    process.join(60)
    assert process.exitcode == 3
    assert f"svdd: 1 prompt could not be drawn: see {case.folder}/failed.jsonl" in case.said()
    failed = [json.loads(line) for line in (case.folder / "failed.jsonl").read_text().splitlines()]
    expected = {
        "prompt_index": 5,
        "image_index": 0,
        "prompt": "wait there",
        "error": "RewardError: reward StubReward failed with RuntimeError: no score for there",
    }
    assert "stub.py" in failed[0].pop("traceback")
    assert failed == [expected]
    images, rest = case.content()
    assert images == {name: png for name, png in whole.content()[0].items() if not name.startswith("000005")}
    scores = [row["rewards"]["StubReward"] for row in whole.content()[1]["rows"] if row["prompt_index"] != 5]
    assert rest["summary"]["failed_prompts"] == 1
    assert (rest["summary"]["prompts"], rest["summary"]["rewards"]["StubReward"]["count"]) == (10, 10)
    assert rest["summary"]["rewards"]["StubReward"]["mean"] == pytest.approx(sum(scores) / 10)
    process = case.fork("--model.on_error", "skip", environment=BAD)  # it fails again
    process.join(60)
    assert case.content()[0] == images
    lost = case.resume("--model.on_error", "skip", before=before)  # repaired
    assert not (case.folder / "failed.jsonl").exists()
    assert case.content() == whole.content()
    table(
        "a reward that fails on one prompt, on_error: skip",
        "the prompt went to failed.jsonl, the rest was drawn",
        3,
        lost,
    )


@pytest.mark.parametrize("kind", ["SystemExit", "MemoryError", "allocator"])
def test_an_exit_or_missing_memory_is_no_fault_of_a_prompt(case: Case, whole: Case, table: Callable, kind: str):
    case.gate.touch()
    process = case.fork("--model.on_error", "skip", environment=BAD | {"STUB_RAISES": kind})
    process.join(60)
    assert process.exitcode == 2
    assert not (case.folder / "failed.jsonl").exists()
    assert kind == "SystemExit" or "error: out of memory: a row does not fit in the reward on cpu" in case.said()
    assert kind != "SystemExit" or "stub.py" in case.said()
    assert kind != "SystemExit" or "called sys.exit(0), which would end the command" in case.said()
    before = case.finished()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    if kind == "SystemExit":
        table("sys.exit(0) in a reward", "ended with an error that names the line", 2, lost)


@pytest.mark.parametrize("closed", ["pipe", "stdout", "stderr"])
def test_output_that_cannot_be_written_does_not_end_the_run(case: Case, whole: Case, table: Callable, closed: str):
    case.gate.touch()
    reader, writer = os.pipe()
    os.close(reader)
    process = case.fork(output=writer if closed == "pipe" else {"stdout": 1, "stderr": 2}[closed])
    os.close(writer)
    process.join(60)
    assert process.exitcode == 0, case.said()[-3000:]
    assert case.content() == whole.content()
    if closed == "pipe":
        table(r"a broken pipe, as in `svdd predict \| true`", "the run was finished", 0, case.resume())


def test_a_run_without_any_image_is_an_error(tmp_path):
    case = Case(tmp_path / "case", ["there", "and there"])
    process = case.fork("--model.on_error", "skip", environment=BAD)
    process.join(60)
    assert process.exitcode == 2
    assert "svdd: error: no prompt could be drawn" in case.said()
    assert len((case.folder / "failed.jsonl").read_text().splitlines()) == 2


def test_failures_in_a_row_end_the_run(tmp_path):
    case = Case(tmp_path / "case", ["good", *(f"prompt {k}" for k in range(50))])
    process = case.fork("--model.on_error", "skip", environment={"STUB_BAD": "prompt"})
    process.join(60)
    assert process.exitcode == 2
    assert "prompts in a row could not be drawn, the last with RewardError: reward StubReward failed" in case.said()
    assert case.resume("--model.on_error", "skip") == 0


def test_two_runs_at_once(case: Case, whole: Case, table: Callable):
    first = case.fork()
    case.waiting(1)
    before = case.finished()
    second = case.fork("--overwrite", "true")
    second.join(60)
    assert second.exitcode == 2
    assert f"{case.folder} is in use by another run (process {first.pid} on " in case.said()
    case.gate.touch()
    first.join(60)
    assert first.exitcode == 0
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("two runs at once in one folder", "the second was refused; the first went on", 2, lost)


def test_while_a_finished_run_is_measured(case: Case, whole: Case, table: Callable, monkeypatch):
    """The folder stays locked, and a signal ends the run."""
    begun, over = case.folder.with_name("begun"), case.folder.with_name("over")

    def measure(*args: object) -> dict:
        begun.touch()
        until(over.exists)
        return {}

    monkeypatch.setattr(Evaluation, "measure", measure)
    case.gate.touch()
    first = case.fork()
    until(begun.exists)
    before = case.finished()
    second = case.fork("--overwrite", "true")
    second.join(60)
    os.kill(first.pid, signal.SIGTERM)
    first.join(60)
    over.touch()
    assert [first.exitcode, second.exitcode] == [143, 2], case.said()[-3000:]
    monkeypatch.undo()
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("SIGTERM while a finished run is measured", "ended at once; the summary was there", 143, lost)


def test_a_full_disk(case: Case, whole: Case, table: Callable):
    process = case.fork(disk=3_000)  # maximum file size in bytes
    case.waiting(1)
    before = case.finished()
    case.gate.touch()
    process.join(60)
    assert process.exitcode == 2
    assert "No space left on device" in case.said() or "File too large" in case.said()
    assert "what is finished is kept: fix the cause and start the same command again" in case.said()
    assert 0 < len(before) <= len(case.finished()) < case.count
    lost = case.resume(before=before)
    assert case.content() == whole.content()
    table("a full disk", "ended with the path and the way out", process.exitcode, lost)


def test_the_summary_states_the_peak_of_memory(tmp_path, capsys):
    """Of the run, where the system can tell: what an earlier run of the same process took does not count."""
    found = []
    for number, prompt in enumerate(("apple", "large apple", "apple")):
        case = Case(tmp_path / str(number), [prompt])
        assert case.run() == 0
        found.append(json.loads((case.folder / "summary.json").read_text())["peak_memory_bytes"])
        assert f"\nmemory: {in_units(found[-1])} of the process at most\n" in capsys.readouterr().out
    before, most, after = found
    assert before > 100e6  # PyTorch alone takes more
    assert most > before + 200e6
    assert after < most - 200e6 or sys.platform != "linux"


def test_out_of_memory_in_the_network(case: Case, whole: Case, table: Callable):
    memory = ("--model.diffusion.most_rows", "1")  # of the two that an image has
    process = case.fork(*memory)
    case.waiting(1)
    process.kill()
    process.join()
    before = case.finished()
    assert len(before) == 4
    assert '"rows_at_once": 1' in (case.folder / "fingerprints.json").read_text()
    case.gate.touch()
    lost = case.resume(*memory, before=before)
    assert "out of memory" not in case.said()  # the second run began with one row
    assert case.content() == whole.content()
    table("out of memory in the network", "the rows at once were halved, and the run went on", 0, lost)
