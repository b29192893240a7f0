"""Faults in `svdd fit` and `svdd calibrate`: kills, signals, damaged checkpoints, a full disk, two at once."""

import multiprocessing
import os
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from svdd.runs.output import hold
from tests.faults.harness import _run, until

STUB = ["--model.reward", "tests.faults.stub.StubReward", "--model.diffusion", "tests.faults.stub.StubDiffusion"]
STUB += ["--model.diffusion.num_inference_steps", "3", "--data.prompts", '["apple", "panda", "car"]']
STUB += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
FIT = ["--model.value.channels", "8", "--model.value.num_blocks", "1", "--data.num_rollouts", "80"]
FIT += ["--data.batch_size", "32", "--trainer.max_epochs", "3"]
CALIBRATE = ["--model.images_per_prompt", "2"]


class Job:
    """One command with its folders, run in forks of this process."""

    def __init__(self, command: str, folder: Path) -> None:
        self.folder, self.output, self.log = folder, folder / "output", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.words = [command, *STUB, *(FIT if command == "fit" else CALIBRATE), "--output", str(self.output)]
        self.words += ["--data.cache", f"{self.output}-cache"] if command == "fit" else []
        self.last, self.best = (self.output / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))

    def start(self, *options: str, operations: int | None = None, disk: int | None = None) -> BaseProcess:
        """Starts the command; it dies after some file operations, or cannot write files of more than `disk` bytes."""
        environment = {} if operations is None else {"STUB_OPERATIONS": str(operations)}
        arguments = ([*self.words, *options], environment, str(self.log), disk, None)
        process = multiprocessing.get_context("fork").Process(target=_run, args=arguments, daemon=True)
        process.start()
        return process

    def run(self, *options: str, operations: int | None = None, disk: int | None = None) -> int | None:
        """Runs the command and returns its exit code."""
        process = self.start(*options, operations=operations, disk=disk)
        process.join(120)
        return process.exitcode

    def said(self) -> str:
        return self.log.read_text()

    def content(self) -> dict[str, object]:
        """Returns the rollouts and the results: of checkpoints what a training depends on, of other files the bytes."""
        found: dict[str, object] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.suffix == ".ckpt":
                checkpoint = torch.load(path, weights_only=True)
                parts = [checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")]
                found[name] = _plain(parts)
            elif path.is_file() and "/logs/" not in name and path.name not in ("log.txt", ".lock", "config.yaml"):
                found[name] = path.read_bytes()
        return found


def _plain(tree: object) -> object:
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {name: _plain(entry) for name, entry in tree.items()}
    return [_plain(entry) for entry in tree] if isinstance(tree, list | tuple) else tree


@pytest.fixture(scope="module", params=["fit", "calibrate"])
def whole(request, tmp_path_factory) -> Job:
    """An undisturbed command."""
    job = Job(request.param, tmp_path_factory.mktemp("whole"))
    assert job.run() == 0, job.said()
    return job


@pytest.fixture
def job(whole, tmp_path) -> Job:
    """The same command, to be disturbed."""
    return Job(whole.words[0], tmp_path)


only_fit = pytest.mark.parametrize("whole", ["fit"], indirect=True)


def test_kills_at_file_operations(job: Job, whole: Job):
    """Each kill meets what the kills before it have left."""
    moments = (30, 38, 30, 26, 34) if job.words[0] == "fit" else (7, 13, 17, 21, 24)
    codes = [job.run(operations=moment) for moment in moments]
    assert codes.count(137) >= 4
    assert job.run() == 0, job.said()
    assert job.content() == whole.content()
    assert not [*job.folder.rglob("*.tmp")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@only_fit
def test_a_signal_waits_for_the_epoch(job: Job, whole: Job, number: int, code: int):
    callback = ["--trainer.callbacks+=tests.faults.stub.Wait", "--trainer.callbacks.gate", str(job.folder / "gate")]
    process = job.start(*callback)
    until((job.folder / "gate.waits").exists)
    os.kill(process.pid, number)
    until(lambda: "the current epoch is finished first" in job.said())
    (job.folder / "gate").touch()
    process.join(60)
    assert process.exitcode == code, job.said()
    assert torch.load(job.last, weights_only=True)["epoch"] == 1  # the second one
    assert "what is finished is kept, and the same command continues" in job.said()
    assert job.run() == 0
    for name in ("gate", "gate.waits"):
        (job.folder / name).unlink()
    assert job.content() == whole.content()


@pytest.mark.parametrize("damage", ["torn", "a flipped bit", "missing"])
@only_fit
def test_the_newest_whole_checkpoint_is_used(job: Job, whole: Job, damage: str):
    shutil.copytree(whole.folder, job.folder, dirs_exist_ok=True)
    data = job.last.read_bytes()
    flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    job.last.write_bytes({"torn": data[: len(data) // 2], "a flipped bit": flipped, "missing": data}[damage])
    if damage == "missing":
        job.last.unlink()
    assert job.run() == 0, job.said()
    expected = f"{job.last} is damaged and was removed: the training continues from best.ckpt"
    assert (expected in job.said()) == (damage != "missing")
    assert job.content() == whole.content()


@only_fit
def test_without_a_whole_checkpoint_the_training_starts_again(job: Job, whole: Job):
    shutil.copytree(whole.folder, job.folder, dirs_exist_ok=True)
    for path in (job.last, job.best):
        path.write_bytes(path.read_bytes()[:1000])
    assert job.run() == 0, job.said()
    assert job.said().count("is damaged and was removed: the training starts again") == 2
    assert job.content() == whole.content()


@only_fit
def test_a_full_disk_keeps_the_old_checkpoint(job: Job, whole: Job):
    shutil.copytree(whole.folder, job.folder, dirs_exist_ok=True)
    shutil.rmtree(job.output)
    assert job.run("--trainer.max_epochs", "1") == 0
    before = job.last.read_bytes()
    job.log.unlink()
    assert job.run(disk=20_000) == 2
    lines = [line for line in job.said().splitlines() if line.startswith("svdd: error")]
    assert len(lines) == 1
    assert "cannot write the run to" in lines[0]
    assert ": File too large; what is finished is kept: fix the cause and start the same command again" in lines[0]
    assert job.last.read_bytes() == before
    assert job.run() == 0


def test_two_at_once(job: Job):
    job.output.mkdir()
    lock = hold(job.output, job.words[0])
    for options in ([], ["--overwrite", "true"]):
        assert job.run(*options) == 2
    assert job.said().count(f"{job.output} is in use by another run (process {os.getpid()} on ") == 2
    lock.release()


def test_overwrite_leaves_what_the_command_did_not_write(job: Job, whole: Job):
    shutil.copytree(whole.output, job.output)
    mine = [job.output / name for name in ("notes.txt", "checkpoints/mine.txt", "logs/version_0/mine.txt")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    other = ["--data.seed", "5"] if job.words[0] == "fit" else ["--model.seed", "5"]
    assert job.run(*other) == 2
    assert "holds a run with other settings" in job.said()
    assert job.run(*other, "--overwrite", "true") == 0, job.said()
    assert all(path.read_text() == "mine" for path in mine)
    results = {name for name in whole.content() if name.startswith("output/")}
    assert results <= job.content().keys()
    seedless = ("png", "prompts.jsonl")  # part of a name
    assert not any(
        job.content()[name] == whole.content()[name] for name in results if not any(map(name.__contains__, seedless))
    )


@only_fit
def test_a_training_that_was_stopped_early_is_not_continued(job: Job):
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    stop += ["--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "9"]
    assert job.run(*stop) == 0, job.said()
    before = job.content()
    assert torch.load(job.last, weights_only=True)["epoch"] == 1
    assert job.run(*stop) == 0, job.said()
    assert job.content() == before


@only_fit
def test_a_number_of_steps_is_reached_as_without_a_kill(job: Job, tmp_path: Path):
    """With `max_steps` Lightning itself would repeat the end of the last epoch."""
    steps, undisturbed = ("--trainer.max_steps", "12"), Job("fit", tmp_path / "undisturbed")
    assert undisturbed.run(*steps) == 0
    assert job.run(*steps, operations=58) == 137
    assert torch.load(job.last, weights_only=True)["global_step"] == 5
    assert job.run(*steps) == 0
    content = {name: entry for name, entry in job.content().items() if not name.startswith("undisturbed/")}
    assert content == undisturbed.content()
