import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from svdd.errors import UserError
from svdd.metrics import RewardStatistics
from svdd.prediction import Prediction
from svdd.run_config import differences
from svdd.run_folder import RunFolder
from svdd.writer import RunError, RunWriter

PROMPTS = ["apple", "blue car", "café ☕ \u2028 line", "lone \ud800", "../../etc/passwd", "x"]
CONFIG = {
    "model": {
        "sampler": {"class_path": "SVDD", "init_args": {"alpha": 1e-05, "num_candidates": 20}},
        "diffusion": {"class_path": "StableDiffusion", "init_args": {"chunk_size": "auto"}},
    },
    "data": {"prompts": "prompts.txt", "batch_size": 2},
    "trainer": {"devices": 1, "precision": None},
    "output": "a",
    "overwrite": False,
}


def image(prompt_index, image_index, size=8):
    generator = torch.Generator().manual_seed(100 * prompt_index + image_index)
    return torch.rand(3, size, size, generator=generator)


class Tiny(L.LightningModule):
    """The contract of GuidedDiffusion without a diffusion model."""

    def __init__(self, images_per_prompt=2, size=8, stop_at=None):
        super().__init__()
        self.images_per_prompt, self.size, self.stop_at = images_per_prompt, size, stop_at
        self.statistics = RewardStatistics()
        self.drawn, self.recalled, self.summary = [], [], {}

    def on_predict_start(self):
        self.statistics.reset()

    def record(self, rows):
        self.recalled += [row["prompt_index"] for row in rows if "file" in row]
        self.statistics.update(torch.tensor([row["rewards"]["r"] for row in rows]))

    def predict_step(self, batch, batch_idx):
        if self.stop_at in batch:
            raise RuntimeError("stopped")
        keys = [(p, k) for p in batch for k in range(self.images_per_prompt)]
        images = torch.stack([image(p, k, self.size) for p, k in keys])
        rows = [
            {
                "prompt_index": p,
                "image_index": k,
                "prompt": PROMPTS[p % len(PROMPTS)],
                "tag": f"extra {p}",
                "seed": 2 * p + k,
                "rewards": {"r": picture.mean().item()},
                "ledger": {"denoiser_rows": torch.tensor(4), "seconds": 0.5},
            }
            for (p, k), picture in zip(keys, images, strict=True)
        ]
        self.record(rows)
        self.drawn += batch
        return Prediction(images, rows)

    def on_predict_epoch_end(self):
        self.summary = {"r": {name: value.item() for name, value in self.statistics.compute().items()}}


def predict(writer, module, prompts, batch_size=2, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[writer], enable_checkpointing=False, **quiet, **kwargs)
    loader = DataLoader(list(prompts), batch_size=batch_size, collate_fn=list)
    trainer.predict(module, loader, return_predictions=False)


def run(folder, prompts=range(6), config=CONFIG, overwrite=False, **kwargs):
    """What the command line does: open, leave out what is finished, predict."""
    writer = RunWriter(folder, config, overwrite, images_per_prompt=2)
    finished = writer.open()
    module = Tiny(**kwargs)
    predict(writer, module, [p for p in prompts if p not in finished])
    return module


def read_rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def read_all(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    summary = json.loads(files.pop("summary.json"))
    assert summary.pop("wall_seconds") >= 0
    files.pop(".lock")
    return files, summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "new" / "run"
    run(folder)
    return folder


def test_leaves_the_run_of_the_design(whole):
    names = {f"images/{p:06d}-{k:02d}.png" for p in range(6) for k in range(2)}
    files, summary = read_all(whole)
    assert set(files) == {"config.yaml", "results.jsonl"} | names
    assert yaml.safe_load(files["config.yaml"]) == CONFIG
    rows = read_rows(whole)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, k) for p in range(6) for k in range(2)]
    for row in rows:
        assert row["sha256"] == hashlib.sha256(files[row["file"]]).hexdigest()
        assert row["prompt"] == PROMPTS[row["prompt_index"]]
        assert row["tag"] == f"extra {row['prompt_index']}"
        assert row["ledger"] == {"denoiser_rows": 4, "seconds": 0.5}
    assert "café ☕".encode() in files["results.jsonl"]
    assert (summary["prompts"], summary["images"], summary["r"]["count"]) == (6, 12, 12)
    assert summary["r"]["mean"] == pytest.approx(np.mean([row["rewards"]["r"] for row in rows]))


def test_text_chunks(whole):
    with Image.open(whole / "images/000002-01.png") as picture:
        text = picture.text
        assert picture.mode == "RGB"
    assert text["prompt"] == PROMPTS[2]
    assert text["seed"] == "5"
    assert json.loads(text["rewards"]) == {"r": image(2, 1).mean().item()}
    assert text["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"svdd", "diffusers"} <= set(text)


def test_rounds_as_diffusers(tmp_path):
    from diffusers.image_processor import VaeImageProcessor

    class Ramp(Tiny):
        def predict_step(self, batch, batch_idx):
            prediction = super().predict_step(batch, batch_idx)
            ramp = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
            ramp.view(-1)[:511] = torch.arange(511) / 510  # ties
            self.images = ramp
            return Prediction(ramp, prediction.rows)

    module = Ramp()
    predict(RunWriter(tmp_path / "run", images_per_prompt=2), module, [0])
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(module.images))
    for k in range(2):
        with Image.open(tmp_path / f"run/images/000000-{k:02d}.png") as picture:
            assert np.array_equal(np.array(picture), np.array(expected[k]))


@pytest.mark.parametrize("bad", [torch.full((2, 3, 8, 8), -1.0), torch.full((2, 3, 8, 8), torch.nan)])
def test_refuses_images_out_of_range(tmp_path, bad):
    class Bad(Tiny):
        def predict_step(self, batch, batch_idx):
            return Prediction(bad, super().predict_step(batch, batch_idx).rows)

    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        predict(RunWriter(tmp_path / "run"), Bad(), [0])


def test_refuses_rows_that_do_not_match(tmp_path):
    class Bad(Tiny):
        def predict_step(self, batch, batch_idx):
            return Prediction(torch.zeros(1, 3, 8, 8), super().predict_step(batch, batch_idx).rows)

    with pytest.raises(ValueError, match="got 2 for 1 images"):
        predict(RunWriter(tmp_path / "run"), Bad(), [0])


def test_strict_json_where_a_number_is_missing(tmp_path):
    writer = RunWriter(tmp_path / "run")
    predict(writer, Tiny(images_per_prompt=1), [0])
    summary = json.loads((tmp_path / "run/summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["r"]["count"] == 1
    assert summary["r"]["std"] is None


def break_nothing(folder):
    return set()


def lose_an_image(folder):
    (folder / "images/000001-01.png").unlink()
    return {1}


def cut_an_image(folder):
    path = folder / "images/000004-00.png"
    path.write_bytes(path.read_bytes()[:-20])
    return {4}


def tear_the_last_line(folder):
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    return {5}


def garble_a_line(folder):
    path = folder / "results.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = b'\xff{"prompt_index": 1' + lines[2]
    path.write_bytes(b"\n".join(lines))
    return {1}


def leave_temporary_files(folder):
    for name in ("results.jsonl.tmp", "summary.json.tmp", "config.yaml.tmp", "images/000001-00.png.tmp"):
        (folder / name).write_bytes(b"half")
    return set()


def die_before_the_fold(folder):
    (folder / "summary.json").unlink()
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").unlink()
    (folder / "results-00000.jsonl").write_bytes(b"".join(lines[::2]))
    (folder / "results-00001.jsonl").write_bytes(b"".join(lines[1::2]))
    return set()


def die_before_the_shards_are_removed(folder):
    (folder / "summary.json").unlink()
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results-00001.jsonl").write_bytes(b"".join(lines[5:]))
    return set()


def die_before_the_summary(folder):
    (folder / "summary.json").unlink()
    return set()


def die_in_a_batch(folder):
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:4]))
    (folder / "results-00000.jsonl").write_bytes(b"".join(lines[8:9]) + lines[9][:30])
    return {2, 3, 4, 5}


def point_elsewhere(folder):
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes().replace(b"images/000003-00.png", b"../run/images/000003-00.png"))
    return {3}


@pytest.mark.parametrize(
    "damage",
    [
        break_nothing,
        lose_an_image,
        cut_an_image,
        tear_the_last_line,
        garble_a_line,
        leave_temporary_files,
        die_before_the_fold,
        die_before_the_shards_are_removed,
        die_before_the_summary,
        die_in_a_batch,
        point_elsewhere,
    ],
)
def test_resume_repairs(tmp_path, whole, damage):
    folder = tmp_path / "run"
    run(folder)
    missing = damage(folder)
    module = run(folder)
    assert set(module.drawn) == missing
    assert sorted(set(module.recalled)) == sorted(set(range(6)) - missing)
    assert read_all(folder) == read_all(whole)


def test_resume_after_an_error(tmp_path, whole):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, stop_at=4)
    assert not (folder / "summary.json").exists()
    assert run(folder).drawn == [4, 5]
    assert read_all(folder) == read_all(whole)


def test_a_summary_is_there_only_when_the_run_is_complete(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=range(4))
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, stop_at=5)
    assert not (folder / "summary.json").exists()
    assert run(folder).drawn == [4, 5]
    assert json.loads((folder / "summary.json").read_text())["prompts"] == 6


def test_other_ranks_read_and_change_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder)
    tear_the_last_line(folder)
    before = read_all(folder)
    monkeypatch.setenv("NODE_RANK", "1")
    assert RunWriter(folder, CONFIG, images_per_prompt=2).open() == {0, 1, 2, 3, 4}
    assert RunWriter(folder, CONFIG, overwrite=True, images_per_prompt=2).open() == set()
    assert RunWriter(tmp_path / "absent", CONFIG).open() == set()
    assert read_all(folder) == before
    assert not (tmp_path / "absent").exists()


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_writer
from svdd.run_folder import RunFolder
from svdd.writer import RunWriter

class Slow(test_writer.Tiny):
    def predict_step(self, batch, batch_idx):
        if 4 in batch:
            print("ready", flush=True)
            sys.stdin.readline()
        return super().predict_step(batch, batch_idx)

test_writer.Tiny = Slow
test_writer.run({folder!r})
"""


@pytest.fixture
def halted(tmp_path):
    """A second process that has drawn four of six prompts and waits."""
    tests = Path(__file__).parent
    script = SCRIPT.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        while (line := process.stdout.readline()) != b"ready\n":
            assert line, "the process ended early"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow
def test_two_runs_at_once_and_kill(tmp_path, whole, halted):
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(RunError, match=f"in use by another run.*process {halted.pid} on"):
            RunWriter(folder, CONFIG, overwrite, images_per_prompt=2).open()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    os.kill(halted.pid, signal.SIGKILL)
    halted.wait()
    assert (folder / "results-00000.jsonl").exists()
    assert run(folder).drawn == [4, 5]
    assert read_all(folder) == read_all(whole)


@pytest.mark.slow
def test_a_process_that_outlived_its_run_is_noticed(tmp_path, halted):
    (tmp_path / "run/.lock").unlink()  # as if rank 0 were gone, and this one, another rank, still wrote its shard
    with pytest.raises(RunError, match="earlier run still writes"):
        RunWriter(tmp_path / "run", CONFIG, images_per_prompt=2).open()


def test_other_settings_are_refused(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0])
    before = read_all(folder)
    other = json.loads(json.dumps(CONFIG))
    other["model"]["sampler"]["init_args"]["num_candidates"] = 4
    other["model"]["seed"] = 1
    with pytest.raises(RunError, match=r"num_candidates was 20, now 4; model.seed was 'not set', now 1.*--overwrite"):
        run(folder, config=other)
    assert read_all(folder) == before
    assert run(folder, prompts=[0], config=other, overwrite=True).drawn == [0]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == other


def test_a_run_that_drew_nothing_binds_nobody(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "run", stop_at=0)
    other = CONFIG | {"ckpt_path": "other"}
    assert run(tmp_path / "run", config=other, prompts=[0]).drawn == [0]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == other


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("trainer.devices", False),
        ("trainer.strategy.init_args.x", False),
        ("trainer.precision", True),
        ("output", False),
        ("overwrite", False),
        ("data.batch_size", False),
        ("data.num_workers", False),
        ("data.prompts", True),
        ("model.diffusion.init_args.chunk_size", False),
        ("model.diffusion.init_args.compile", False),
        ("model.diffusion.init_args.eta", True),
        ("model.diffusion.class_path", True),
        ("ckpt_path", True),
    ],
)
def test_what_may_change(key, counts):
    other = json.loads(json.dumps(CONFIG))
    *parents, name = key.split(".")
    branch = other
    for parent in parents:
        branch = branch.setdefault(parent, {})
    branch[name] = "changed"
    assert bool(differences(CONFIG, other)) == counts
    assert bool(differences(other, CONFIG)) == counts
    assert not differences(other, other)


def test_a_harmless_change_continues(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0])
    other = json.loads(json.dumps(CONFIG))
    other["trainer"]["devices"], other["data"]["batch_size"] = 8, 64
    assert run(folder, prompts=[0, 1], config=other).drawn == [1]


def test_overwrite_keeps_foreign_files(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=range(6))
    foreign = ["notes.txt", "keep.tmp", "results.csv", "results-old.jsonl", "images/mine.png", "images/1-1.png"]
    for name in foreign:
        (folder / name).write_text("mine")
    (folder / "trace.jsonl").write_text("old")
    assert run(folder, prompts=[1], overwrite=True).drawn == [1]
    expected = {"config.yaml", "results.jsonl", "images/000001-00.png", "images/000001-01.png", *foreign}
    files, _ = read_all(folder)
    assert set(files) == expected
    assert all(files[name] == b"mine" for name in foreign)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.yaml", "results.jsonl", "thesis.tex"])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path, name, overwrite):
    (tmp_path / name).write_text("model: mine")
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(RunError, match="is not a run folder"):
        RunWriter(tmp_path, CONFIG, overwrite).open()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "summary.json"])
    assert (tmp_path / name).read_text() == "model: mine"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="must be a folder, got the file"):
        RunWriter(tmp_path / "file").open()
    with pytest.raises(RunError, match="Not a directory"):
        RunWriter(tmp_path / "file" / "run").open()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(tmp_path):
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path
    if os.geteuid():
        folder.chmod(0o500)
    with pytest.raises(RunError, match=f"cannot write the run to {folder}/run: .*--output") as caught:
        RunWriter(folder / "run").open()
    assert isinstance(caught.value, UserError)


def test_a_full_disk_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
        with pytest.raises(RunError, match=r"cannot write the run to .*what is finished is kept"):
            run(folder, prompts=[0, 1, 2], size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    module = run(folder, prompts=[0, 1, 2])
    assert (module.drawn, sorted(set(module.recalled))) == ([2], [0, 1])
    assert not list(folder.rglob("*.tmp"))


def test_an_unopened_writer_opens_itself_but_never_draws_twice(tmp_path):
    folder = tmp_path / "run"
    predict(RunWriter(folder, images_per_prompt=2), Tiny(), [0])
    assert len(read_rows(folder)) == 2
    with pytest.raises(RunError, match="already holds 1 finished prompts"):
        predict(RunWriter(folder, images_per_prompt=2), Tiny(), [0])
    predict(RunWriter(folder, images_per_prompt=2, overwrite=True), Tiny(), [1])
    assert [row["prompt_index"] for row in read_rows(folder)] == [1, 1]


def test_a_prompt_needs_all_its_images(tmp_path):
    folder = tmp_path / "run"
    predict(RunWriter(folder, images_per_prompt=2), Tiny(images_per_prompt=2), [0])
    assert RunWriter(folder, images_per_prompt=3).open() == set()
    with pytest.raises(ValueError, match="images_per_prompt must be >= 1, got 0"):
        RunWriter(folder, images_per_prompt=0)


TWO_PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_writer import CONFIG, RunWriter, Tiny, predict

writer = RunWriter({folder!r}, CONFIG, images_per_prompt=2)
finished = writer.open()
prompts = [p for p in range(int(sys.argv[1])) if p not in finished]
predict(writer, Tiny(), prompts, batch_size=1, devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_two_processes(tmp_path, whole):
    folder = tmp_path / "run"
    script = tmp_path / "script.py"
    tests = Path(__file__).parent
    script.write_text(TWO_PROCESSES.format(root=str(tests.parent), tests=str(tests), folder=str(folder)))

    def launch(count):
        command = [sys.executable, str(script), str(count)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert process.returncode == 0, process.stderr[-3000:]

    launch(3)
    assert [row["prompt_index"] for row in read_rows(folder)] == [0, 0, 1, 1, 2, 2]
    launch(6)
    assert read_all(folder) == read_all(whole)
    (folder / "summary.json").unlink()  # killed before the last step: nothing is left to draw
    launch(6)
    assert read_all(folder) == read_all(whole)


class Crash(BaseException):
    pass


class CrashAt:
    """Stops before or after the k-th change that is made to the disk, as a kill would."""

    def __init__(self, monkeypatch, step):
        self.left = step
        for name in ("mkdir", "replace", "fsync", "write", "unlink", "ftruncate"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def tick(self):
        self.left -= 1
        if self.left == 0:
            raise Crash


def work_through(folder, overwrite=False, label="new"):
    """All that a run writes, without a Trainer; returns what was drawn."""
    run_folder = RunFolder(folder)
    try:
        finished = run_folder.claim({"label": label}, overwrite)
        run_folder.open_shard(0)
        drawn = [p for p in range(3) if p not in finished]
        for p in drawn:
            run_folder.write([({"prompt_index": p, "image_index": 0}, f"{label} {p}".encode())])
        run_folder.close_shard()
        run_folder.merge()
        run_folder.write_summary({"images": 3})
    finally:
        run_folder.close()
    return drawn


@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_crash_at_every_step(tmp_path, monkeypatch, overwrite):
    work_through(tmp_path / "whole")
    expected = sorted((path.name, path.read_bytes()) for path in (tmp_path / "whole").rglob("[!.]*.*"))
    steps = 0
    while True:
        steps += 1
        folder = tmp_path / str(steps)
        if overwrite:
            work_through(folder, label="old")
        with monkeypatch.context() as patch:
            crash = CrashAt(patch, steps)
            try:
                work_through(folder, overwrite)
            except Crash:
                whole_rows = [line for path in folder.glob("results*.jsonl") for line in path.read_text().splitlines()]
        if crash.left > 0:
            break
        try:
            drawn = work_through(folder)
        except RunError:  # the old configuration is still there: the user says --overwrite again
            assert overwrite
            drawn = work_through(folder, overwrite)
        else:
            recorded = {json.loads(line)["prompt_index"] for line in whole_rows}
            assert set(drawn) == set(range(3)) - recorded, "a finished image was lost or taken for granted"
        assert sorted((path.name, path.read_bytes()) for path in folder.rglob("[!.]*.*")) == expected
    assert steps > 50


def test_large_runs_are_read_in_parts(tmp_path):
    folder = tmp_path / "run"
    writer = RunWriter(folder)
    writer.open()
    lines = [json.dumps({"prompt_index": p, "rewards": {"r": 0.5}, "file": "x"}) for p in range(2500)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    parts = list(writer.folder.rows(1000))
    assert [len(part) for part in parts] == [1000, 1000, 500]
    assert [row["prompt_index"] for part in parts for row in part] == list(range(2500))
