import ast
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

import svdd
from svdd import UserError
from svdd.__main__ import main
from svdd.evaluation.metrics import RewardStatistics
from svdd.runs.config import HARMLESS, HARMLESS_IF_REPRODUCIBLE, differences, write_config
from svdd.runs.files import lock
from svdd.runs.folder import RunFolder
from svdd.runs.images import image_name
from svdd.runs.json_lines import encode
from svdd.runs.prediction import Prediction
from svdd.runs.processes.environment import ignore_incomplete, node_rank
from svdd.runs.writer import RunError, RunWriter

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


ROW = {"prompt_index": 0, "image_index": 0, "num_images": 1, "prompt": "", "rewards": {"r": 0.5}, "ledger": {}}


def image(prompt_index, image_index, size=8):
    generator = torch.Generator().manual_seed(100 * prompt_index + image_index)
    return torch.rand(3, size, size, generator=generator)


def trace(prompt_index, image_index, choices=3):
    columns = {"step": list(range(choices)), "ess": [None] * choices, "value_max": [prompt_index + 0.5] * choices}
    return {"prompt_index": prompt_index, "image_index": image_index, **columns}


class Tiny(L.LightningModule):
    """The contract of GuidedDiffusion without a diffusion model; `peak(module)` is the memory it has taken."""

    def __init__(self, images_per_prompt=2, size=8, stop_at=None, choices=3, peak=None):
        super().__init__()
        if peak is not None:
            memory = SimpleNamespace(peak=lambda: peak(self))
            self.diffusion = SimpleNamespace(peak_memory=lambda: memory)
        self.images_per_prompt, self.size = images_per_prompt, size
        self.stop_at, self.choices = stop_at, choices
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
                "num_images": self.images_per_prompt,
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
        return Prediction(images, rows, [trace(p, k, self.choices) for p, k in reversed(keys)] if self.choices else [])

    def on_predict_epoch_end(self):
        self.summary = {"r": {name: value.item() for name, value in self.statistics.compute().items()}}


def predict(writer, module, prompts, batch_size=2, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[writer], enable_checkpointing=False, **quiet, **kwargs)
    loader = DataLoader(list(prompts), batch_size=batch_size, collate_fn=list)
    trainer.predict(module, loader, return_predictions=False)


def run(folder, prompts=range(6), config=CONFIG, overwrite=False, **kwargs):
    """Opens the folder, skips finished prompts and predicts, as the command line does."""
    writer = RunWriter(folder, config, overwrite)
    finished = writer.open()
    module = Tiny(**kwargs)
    predict(writer, module, [p for p in prompts if p not in finished])
    return module


def read_rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def read_traces(folder, name="trace.jsonl"):
    return [json.loads(line) for line in (folder / name).read_bytes().split(b"\n")[:-1]]


def edit_rows(folder, edit):
    """Rewrites results.jsonl with each row edited in place."""
    rows = read_rows(folder)
    for row in rows:
        edit(row)
    (folder / "results.jsonl").write_bytes(b"".join(encode(row) + b"\n" for row in rows))


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_all(folder):
    files = read_folder(folder)
    summary = json.loads(files.pop("summary.json"))
    assert summary.pop("wall_seconds") >= 0
    if "peak_memory_bytes" in summary:
        assert json.loads(files.pop("fingerprints.json")) == {"peak_memory_bytes": summary.pop("peak_memory_bytes")}
    files.pop(".lock")
    return files, summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "new" / "run"
    run(folder)
    return folder


def test_writes_all_documented_files(whole):
    names = {f"images/{p:06d}-{k:02d}.png" for p in range(6) for k in range(2)}
    files, summary = read_all(whole)
    assert set(files) == {"config.yaml", "results.jsonl", "trace.jsonl"} | names
    assert yaml.safe_load(files["config.yaml"]) == CONFIG
    rows = read_rows(whole)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, k) for p in range(6) for k in range(2)]
    for row in rows:
        assert row["sha256"] == hashlib.sha256(files[row["file"]]).hexdigest()
        assert row["prompt"] == PROMPTS[row["prompt_index"]]
        assert row["num_images"] == 2
        assert row["tag"] == f"extra {row['prompt_index']}"
        assert row["ledger"] == {"denoiser_rows": 4, "seconds": 0.5}
    assert read_traces(whole) == [trace(p, k) for p in range(6) for k in range(2)]
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


def test_rounds_like_diffusers(tmp_path):
    from diffusers.image_processor import VaeImageProcessor

    class Ramp(Tiny):
        def predict_step(self, batch, batch_idx):
            prediction = super().predict_step(batch, batch_idx)
            ramp = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
            ramp.view(-1)[:511] = torch.arange(511) / 510  # ties
            self.images = ramp
            return Prediction(ramp, prediction.rows)

    module = Ramp()
    predict(RunWriter(tmp_path / "run"), module, [0])
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
    for name in (
        "results.jsonl.tmp",
        "trace.jsonl.tmp",
        "summary.json.tmp",
        "config.yaml.tmp",
        "images/000001-00.png.tmp",
    ):
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


def split_traces(folder, keep=0):
    """Moves all but the first `keep` traces back into the shards of two processes."""
    (folder / "summary.json").unlink()
    path = folder / "trace.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    (folder / "trace-00000.jsonl").write_bytes(b"".join(lines[keep::2]))
    (folder / "trace-00001.jsonl").write_bytes(b"".join(lines[keep + 1 :: 2]))
    path.write_bytes(b"".join(lines[:keep])) if keep else path.unlink()


def die_before_the_fold_of_traces(folder):
    split_traces(folder)
    return set()


def die_between_two_folds_of_traces(folder):
    split_traces(folder, keep=4)
    return set()


def die_before_the_shards_of_traces_are_removed(folder):
    traces = (folder / "trace.jsonl").read_bytes()
    split_traces(folder)
    (folder / "trace.jsonl").write_bytes(traces)
    return set()


def die_between_traces_and_rows(folder):
    """Removes the rows of prompt 5; its traces stay, from an earlier attempt, the last one torn."""
    split_traces(folder, keep=10)
    rows = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(rows[:10]))
    old = json.dumps(trace(5, 0, choices=1)).encode() + b"\n"
    (folder / "trace-00000.jsonl").write_bytes(old + json.dumps(trace(5, 1, choices=1)).encode()[:40])
    return {5}


def leave_an_old_trace(folder):
    """Writes a trace.jsonl that is older than the shards."""
    traces = (folder / "trace.jsonl").read_bytes()
    split_traces(folder)
    (folder / "trace.jsonl").write_bytes(traces.replace(b"[0, 1, 2]", b"[7, 8, 9]"))
    return set()


def garble_the_file_of_traces(folder):
    with open(folder / "trace.jsonl", "ab") as file:
        file.write(
            b'\xff\n[1]\n"x"\n{"prompt_index": true, "image_index": 0}\n{"prompt_index": 9, "image_index": 0}\n{}'
        )
    return set()


def lose_the_number_of_images(folder):
    edit_rows(folder, lambda row: row.pop("num_images") if row["prompt_index"] == 3 else None)
    return {3}


def garble_the_number_of_images(folder):
    wrong = {(0, 1): 0, (1, 0): True, (2, 1): 2.0, (3, 0): "2", (4, 1): 1, (5, 0): None}
    edit_rows(
        folder,
        lambda row: row.update(num_images=wrong.get((row["prompt_index"], row["image_index"]), row["num_images"])),
    )
    return set(range(6))


def expect_three_images(folder):
    edit_rows(folder, lambda row: row.update(num_images=3) if (row["file"] == "images/000002-00.png") else None)
    return {2}


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


def replace_row(change):
    """Replaces the row of prompt 3's second image by what `change` makes of it, and of its line."""

    def damage(folder):
        lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
        changed = change(json.loads(lines[7]), lines[7])
        lines[7] = changed if isinstance(changed, bytes) else json.dumps(changed).encode() + b"\n"
        (folder / "results.jsonl").write_bytes(b"".join(lines))
        return set() if changed == 2 * lines[7][: len(lines[7]) // 2] else {3}

    return damage


def fill_the_end_with_zeros(folder):
    """What a power cut may leave."""
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-40] + bytes(3000))
    return {5}


def garble_the_summary(folder):
    (folder / "summary.json").write_bytes(bytes(100))
    return set()


DAMAGED_ROWS = {
    "twice": lambda row, line: 2 * line,
    "nested 100,000 deep": lambda row, line: line.replace(b'"extra 3"', b"[" * 100_000 + b"]" * 100_000),
    "a list": lambda row, line: [row],
    "no rewards": lambda row, line: {name: value for name, value in row.items() if name != "rewards"},
    "rewards in a list": lambda row, line: row | {"rewards": [0.5]},
    "a score in words": lambda row, line: row | {"rewards": {"r": "0.5"}},
    "no prompt": lambda row, line: row | {"prompt": None},
    "a prompt's number that is true": lambda row, line: row | {"prompt_index": True},
    "another file's checksum": lambda row, line: row | {"sha256": "0" * 64},
    "not UTF-8": lambda row, line: line.replace(b"extra", b"\xff\xfe"),
}


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(replace_row(change), id=name) for name, change in DAMAGED_ROWS.items()),
        fill_the_end_with_zeros,
        garble_the_summary,
        break_nothing,
        lose_an_image,
        cut_an_image,
        tear_the_last_line,
        garble_a_line,
        leave_temporary_files,
        lose_the_number_of_images,
        garble_the_number_of_images,
        expect_three_images,
        die_before_the_fold_of_traces,
        die_between_two_folds_of_traces,
        die_before_the_shards_of_traces_are_removed,
        die_between_traces_and_rows,
        leave_an_old_trace,
        garble_the_file_of_traces,
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


def test_a_row_of_another_reward_is_named(tmp_path):
    """It is whole, so only the module can tell."""
    folder = tmp_path / "run"
    run(folder)
    edit_rows(folder, lambda row: row.update(rewards={"other": 1.0}) if row["image_index"] and row["seed"] == 7 else 0)
    with pytest.raises(RunError, match=r"results\.jsonl, line 8, is not a row of this run \('r'\): remove the line"):
        run(folder)
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:7] + lines[8:]))
    assert run(folder).drawn == [3]


def test_a_file_that_is_removed_while_it_is_written_ends_the_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({})
    folder.open_shard(0)
    folder.write([(ROW, b"png")])
    (folder.path / "results-00000.jsonl").unlink()
    with pytest.raises(RunError, match=r"results-00000\.jsonl: the file was removed while it was written"):
        folder.write([(ROW, b"png")])
    folder.close()


@pytest.mark.parametrize("drawn", [False, True])
def test_a_run_that_begins_anew_leaves_no_picture_of_the_old_one(tmp_path, drawn):
    """The old one was killed before its first row, or while --overwrite removed it."""
    folder = tmp_path / "run"
    run(folder, prompts=range(6), config=CONFIG | {"seed": 1})
    (folder / "images" / "mine.png").write_bytes(b"mine")
    if drawn:
        (folder / ".overwriting").touch()
    else:
        (folder / "results.jsonl").unlink()
    assert run(folder, prompts=[0]).drawn == [0]
    images = ["images/000000-00.png", "images/000000-01.png", "images/mine.png"]
    assert sorted(read_folder(folder)) == sorted(
        [".lock", "config.yaml", "results.jsonl", "summary.json", "trace.jsonl", *images]
    )
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG


def test_resume_after_an_error(tmp_path, whole):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, stop_at=4)
    assert not (folder / "summary.json").exists()
    assert run(folder).drawn == [4, 5]
    assert read_all(folder) == read_all(whole)


@pytest.mark.parametrize(("first", "second"), [(9000, 5000), (5000, 9000)])
def test_the_summary_states_the_largest_peak_of_memory(tmp_path, whole, first, second):
    """Of an interrupted run and its continuation; a run that begins anew forgets it."""
    folder = tmp_path / "run"

    def stated():
        return json.loads((folder / "summary.json").read_text()).get("peak_memory_bytes")

    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, stop_at=4, peak=lambda module: first + len(module.drawn))
    assert run(folder, peak=lambda module: second - len(module.drawn)).drawn == [4, 5]
    assert stated() == max(first + 4, second - 2)
    assert read_all(folder) == read_all(whole)
    (folder / "summary.json").unlink()
    assert run(folder, peak=lambda module: 10_000).drawn == []
    assert stated() == max(first + 4, second - 2)
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, overwrite=True, stop_at=4, peak=lambda module: 10_000)
    run(folder, overwrite=True, peak=lambda module: 10 - len(module.drawn))
    assert stated() == 8
    run(folder, overwrite=True, peak=lambda module: None)  # a device that cannot tell
    assert stated() is None
    assert read_all(folder) == read_all(whole)


def test_a_summary_is_there_only_when_the_run_is_complete(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=range(4))
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, stop_at=5)
    assert not (folder / "summary.json").exists()
    assert run(folder).drawn == [4, 5]
    assert json.loads((folder / "summary.json").read_text())["prompts"] == 6


def test_without_work_left_rank_0_runs_no_collective(tmp_path):
    """The module is on the CPU at that point, and NCCL has no collectives for CPU tensors."""

    def collective(*args, **kwargs):
        pytest.fail("a collective although nothing is left to draw")

    run(tmp_path)
    writer, module = RunWriter(tmp_path, CONFIG), Tiny()
    assert writer.open() == set(range(6))
    available = module.statistics.distributed_available_fn = lambda: True
    module.statistics.dist_sync_fn = collective
    predict(writer, module, [])
    assert module.summary["r"]["count"] == 12
    assert module.statistics.distributed_available_fn is available


def test_a_folder_is_locked_until_it_is_closed(tmp_path):
    """The lock covers the evaluation after the prediction: no other run can start before `close`."""
    other = "import sys; from svdd.runs.writer import RunWriter; RunWriter(sys.argv[1], overwrite=True).open()"

    def begin():
        command = [sys.executable, "-c", other, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.open(hold=True)
    predict(writer, Tiny(), [0])
    writer.folder.amend_summary({"more": 1})
    assert "is in use by another run" in begin().stderr
    writer.close()
    assert begin().returncode == 0


def test_failures_in_a_row_end_the_run(tmp_path):
    class Bad(Tiny):
        def predict_step(self, batch, batch_idx):
            if batch == [5]:
                return super().predict_step(batch, batch_idx)
            failure = {"prompt_index": batch[0], "image_index": 0, "prompt": "x", "error": "RewardError: no score"}
            return Prediction(torch.zeros(0, 3, 1, 1), [], failures=[failure])

    writer = RunWriter(tmp_path, CONFIG)
    with pytest.raises(UserError, match="20 prompts in a row could not be drawn, the last with RewardError: no score"):
        predict(writer, Bad(), range(100), batch_size=1)
    assert len((tmp_path / "failed-00000.jsonl").read_text().splitlines()) == 25
    assert RunWriter(tmp_path, CONFIG).open() == {5}


TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
TORCHRUN |= {"GROUP_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        *(({name: value}, None) for name in (*TORCHRUN, *SLURM, "NODE_RANK") for value in ("1", "garbage")),
        (
            {name: value for name, value in (TORCHRUN | SLURM).items() if name not in ("MASTER_ADDR", "SLURM_NODEID")},
            None,
        ),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, None),
        (TORCHRUN | {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": ""}, None),  # a container of one process
        (TORCHRUN, "torchrun"),
        (SLURM | {"RANK": "x", "NODE_RANK": "1"}, "SLURM"),
        (TORCHRUN | SLURM, "torchrun"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first' in the environment is no launcher's: expected an integer >= 0"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment contradict each other"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT='0' .* expected an integer >= 1"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID='-1'"),
        (SLURM | {"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": ""}, "WORLD_SIZE=2 in the environment belong to no torchrun and no srun"),
    ],
    ids=str,
)
def test_variables_of_launchers_count_only_in_whole_sets(monkeypatch, variables, expected):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in {*TORCHRUN, "NODE_RANK"}:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected in (None, "torchrun", "SLURM"):
        assert ignore_incomplete() == expected
        left = {name for name in variables if name in os.environ}
        assert left == {None: set(), "torchrun": set(TORCHRUN), "SLURM": set(SLURM) | left & {"MASTER_PORT"}}[expected]
        assert node_rank() == 0
    else:
        with pytest.raises(UserError, match=expected):
            ignore_incomplete()


def test_a_script_of_rank_0_that_believes_it_is_another_does_not_write(tmp_path, monkeypatch):
    for name, value in {"NODE_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    writer = RunWriter(tmp_path / "run", CONFIG)
    assert writer.open() == set()
    with pytest.raises(RunError, match="is not held by this process, the first of the run"):
        predict(writer, Tiny(), range(2))
    assert not (tmp_path / "run").exists()


def test_other_ranks_read_and_change_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder)
    tear_the_last_line(folder)
    before = read_all(folder)
    for name, value in (TORCHRUN | {"RANK": "1", "GROUP_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert RunWriter(folder, CONFIG).open() == {0, 1, 2, 3, 4}
    assert RunWriter(folder, CONFIG, overwrite=True).open() == set()
    assert RunWriter(tmp_path / "absent", CONFIG).open() == set()
    assert read_all(folder) == before
    assert not (tmp_path / "absent").exists()


SCRIPT = """
import sys
import threading
sys.path[:0] = [{root!r}, {tests!r}]
import test_writer
from svdd.runs.folder import RunFolder
from svdd.runs.writer import RunWriter

class Slow(test_writer.Tiny):
    def predict_step(self, batch, batch_idx):
        if 4 in batch:
            [thread.join() for thread in threading.enumerate() if thread.name == "svdd-writer"]
            print("ready", flush=True)
            sys.stdin.readline()
        return super().predict_step(batch, batch_idx)

test_writer.Tiny = Slow
test_writer.run({folder!r})
"""


@pytest.fixture
def halted(tmp_path):
    """A second process that blocks after four of six prompts."""
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
            RunWriter(folder, CONFIG, overwrite).open()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    os.kill(halted.pid, signal.SIGKILL)
    halted.wait()
    assert (folder / "results-00000.jsonl").exists()
    assert run(folder).drawn == [4, 5]
    assert read_all(folder) == read_all(whole)


@pytest.mark.slow
def test_a_process_that_outlives_its_run_is_detected(tmp_path, halted):
    (tmp_path / "run/.lock").unlink()  # as if rank 0 had died while another rank still writes its shard
    with pytest.raises(RunError, match="earlier run still writes"):
        RunWriter(tmp_path / "run", CONFIG).open()


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


def test_a_run_with_a_damaged_configuration_is_not_continued(tmp_path):
    run(tmp_path / "run", prompts=[0])
    config = tmp_path / "run" / "config.yaml"
    config.write_bytes(config.read_bytes()[:60] + bytes(200))
    before = read_folder(tmp_path / "run")
    with pytest.raises(RunError, match=r"a run with unknown settings, as its config\.yaml is damaged\. Choose another"):
        run(tmp_path / "run", prompts=[0, 1])
    assert read_folder(tmp_path / "run") == before


def test_settings_may_change_until_something_is_drawn(tmp_path):
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
        ("data.batch_size", None),
        ("data.num_workers", False),
        ("data.prompts", True),
        ("model.diffusion.init_args.chunk_size", None),
        ("model.diffusion.init_args.compile", True),
        ("model.diffusion.init_args.reproducible", True),
        ("model.diffusion.init_args.eta", True),
        ("model.diffusion.class_path", True),
        ("ckpt_path", True),
    ],
)
def test_what_may_change(key, counts):
    """None: only in the reproducible mode."""
    other = json.loads(json.dumps(CONFIG))
    *parents, name = key.split(".")
    branch = other
    for parent in parents:
        branch = branch.setdefault(parent, {})
    branch[name] = "changed"
    for harmless, expected in ((HARMLESS, counts is not False), (HARMLESS_IF_REPRODUCIBLE, counts is True)):
        assert bool(differences(CONFIG, other, harmless)) == expected
        assert bool(differences(other, CONFIG, harmless)) == expected
    assert not differences(other, other)


def test_a_harmless_change_continues(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0])
    other = json.loads(json.dumps(CONFIG))
    other["trainer"]["devices"], other["data"]["num_workers"] = 8, 64
    assert run(folder, prompts=[0, 1], config=other).drawn == [1]


def test_overwrite_keeps_unrelated_files(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=range(6))
    foreign = ["notes.txt", "keep.tmp", "results.csv", "results-old.jsonl", "trace-old.jsonl", "traces.jsonl"]
    foreign += ["images/mine.png", "images/1-1.png"]
    for name in foreign:
        (folder / name).write_text("mine")
    for name in ("trace.jsonl", "trace-00000.jsonl", "trace-00003.jsonl"):
        (folder / name).write_text(json.dumps(trace(1, 0, choices=1)) + "\n")
    assert run(folder, prompts=[1], overwrite=True, choices=0).drawn == [1]
    expected = {"config.yaml", "results.jsonl", "images/000001-00.png", "images/000001-01.png", *foreign}
    files, _ = read_all(folder)
    assert set(files) == expected
    assert all(files[name] == b"mine" for name in foreign)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.yaml", "results.jsonl", "thesis.tex"])
def test_an_unrelated_folder_is_refused_and_unchanged(tmp_path, name, overwrite):
    (tmp_path / name).write_text("model: mine")
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(RunError, match="is not a run folder"):
        RunWriter(tmp_path, CONFIG, overwrite).open()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "summary.json"])
    assert (tmp_path / name).read_text() == "model: mine"


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize("kind", ["predict", "fit", "score"])
def test_no_command_touches_the_folder_of_another(tmp_path, kind, overwrite, capsys):
    """The commands refuse it before they load a model or read a picture."""
    other = "fit" if kind != "fit" else "predict"
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    folder.mkdir()
    prompts.write_text("apple")
    write_config(folder, other, CONFIG)
    (folder / "summary.json").write_text("{}")
    before = read_folder(folder)
    words = ["--output", str(folder)]
    if kind == "score":
        Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
        words += ["--reward", "Brightness", "--images", str(tmp_path)]
    else:
        words += ["--model.reward", "Brightness", "--data.prompts", str(prompts)]
        words += ["--trainer.accelerator", "cpu", "--overwrite", overwrite]
    assert main([kind, *words]) == 2
    expected = f"{folder} holds the output of `svdd {other}`, which `svdd {kind}` neither continues nor removes"
    assert expected in capsys.readouterr().err
    assert {name: data for name, data in read_folder(folder).items() if name != ".lock"} == before


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


@contextmanager
def full_disk(size):
    """Limits the size of files, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0, 1])
    with full_disk(8_000), pytest.raises(RunError, match=r"cannot write the run to .*what is finished is kept"):
        run(folder, prompts=[0, 1, 2], size=64)
    module = run(folder, prompts=[0, 1, 2])
    assert (module.drawn, sorted(set(module.recalled))) == ([2], [0, 1])
    assert not list(folder.rglob("*.tmp"))


def test_a_disk_that_is_full_of_traces_loses_nothing(tmp_path, whole):
    folder = tmp_path / "run"
    run(folder, prompts=[0, 1])
    with full_disk(8_000), pytest.raises(RunError, match=r"run to .*/trace-00000.jsonl: .*what is finished is kept"):
        run(folder, prompts=range(6), choices=1000)
    assert (folder / "trace-00000.jsonl").stat().st_size == 8_000  # torn
    assert (folder / "results-00000.jsonl").stat().st_size == 0
    assert run(folder).drawn == [2, 3, 4, 5]
    assert read_all(folder) == read_all(whole)


def test_an_unopened_writer_opens_itself_but_never_draws_twice(tmp_path):
    folder = tmp_path / "run"
    predict(RunWriter(folder), Tiny(), [0])
    assert len(read_rows(folder)) == 2
    with pytest.raises(RunError, match="already holds 1 finished prompts"):
        predict(RunWriter(folder), Tiny(), [0])
    predict(RunWriter(folder, overwrite=True), Tiny(), [1])
    assert [row["prompt_index"] for row in read_rows(folder)] == [1, 1]


def test_a_prompt_needs_all_its_images(tmp_path):
    folder = tmp_path / "run"
    predict(RunWriter(folder), Tiny(images_per_prompt=3), [0, 1])
    assert RunWriter(folder).open() == {0, 1}
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    assert RunWriter(folder).open() == {1}
    assert {row["prompt_index"] for row in read_rows(folder)} == {
        trace["prompt_index"] for trace in read_traces(folder)
    }


@pytest.mark.parametrize("wrong", [{"num_images": None}, {"num_images": 1}, {"image_index": -1}, {"num_images": 2.0}])
def test_a_row_that_could_not_be_read_back_is_refused(tmp_path, wrong):
    class Bad(Tiny):
        def predict_step(self, batch, batch_idx):
            prediction = super().predict_step(batch, batch_idx)
            prediction.rows[1].update(wrong)
            return prediction

    with pytest.raises(ValueError, match=r"an entry of results.jsonl needs .* num_images > image_index >= 0, got"):
        predict(RunWriter(tmp_path / "run"), Bad(), [0])


def test_a_trace_that_could_not_be_read_back_is_refused(tmp_path):
    class Bad(Tiny):
        def predict_step(self, batch, batch_idx):
            prediction = super().predict_step(batch, batch_idx)
            return Prediction(prediction.images, prediction.rows, [{"prompt_index": 0, "step": [1]}])

    with pytest.raises(ValueError, match=r"an entry of trace.jsonl needs .*'image_index': None"):
        predict(RunWriter(tmp_path / "run"), Bad(), [0])


def test_without_traces_there_is_no_file(tmp_path):
    folder = tmp_path / "run"
    run(folder, choices=0, prompts=range(4))
    with pytest.raises(RuntimeError, match="stopped"):
        run(folder, choices=0, stop_at=5)
    assert not list(folder.glob("trace*"))
    run(folder, choices=0)
    assert not list(folder.glob("trace*"))


def test_stale_traces_leave_no_file(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0])
    (folder / "results.jsonl").unlink()
    run(folder, prompts=[0], choices=0)
    assert not list(folder.glob("trace*"))


def test_a_run_that_began_without_traces_continues_with_them(tmp_path):
    folder = tmp_path / "run"
    run(folder, prompts=[0, 1], choices=0)
    assert run(folder, prompts=range(3)).drawn == [2]
    assert read_traces(folder) == [trace(2, 0), trace(2, 1)]


def test_a_torn_trace_of_a_finished_prompt_is_dropped(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    path = folder / "trace.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(folder).drawn == []
    assert read_traces(folder) == [trace(p, k) for p in range(6) for k in range(2)][:-1]


def test_traces_of_several_ranks_are_merged(tmp_path):
    folders = [RunFolder(tmp_path) for _ in range(3)]
    folders[0].claim({})
    for rank, folder in enumerate(folders):
        folder.open_shard(rank)
    assert not list(tmp_path.glob("trace*"))
    for p in (4, 3, 2, 1, 0, 0):  # the last prompt also pads the last batch of another rank
        row = {**ROW, "prompt_index": p, "num_images": 2}
        batch = [(row, b"a"), ({**row, "image_index": 1}, b"b")]
        folders[p % 2].write(batch, [trace(p, 0), *([trace(p, 1)] if p % 2 else [])])  # two images may share a write
    folders[1].write([({**ROW, "num_images": 2}, b"a")], [trace(0, 0)])
    assert sorted(path.name for path in tmp_path.glob("trace*")) == ["trace-00000.jsonl", "trace-00001.jsonl"]
    assert [entry["prompt_index"] for entry in read_traces(tmp_path, "trace-00001.jsonl")] == [3, 3, 1, 1, 0]
    for folder in folders:
        folder.close_shard()
    assert folders[0].merge() == (5, 10, 0)
    assert read_traces(tmp_path) == [trace(p, k) for p in range(5) for k in ((0, 1) if p % 2 else (0,))]
    assert [path.name for path in tmp_path.glob("*-0*")] == []
    folders[0].close()


TWO_PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_writer import CONFIG, RunWriter, Tiny, predict

writer = RunWriter({folder!r}, CONFIG)
finished = writer.open()
prompts = [p for p in range(int(sys.argv[1])) if p not in finished]
module = Tiny(peak=lambda module: 1000 * (module.global_rank + 1) + len(module.drawn))
predict(writer, module, prompts, batch_size=1, devices=2, strategy="ddp")
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
    assert json.loads((folder / "summary.json").read_text())["peak_memory_bytes"] == 2001  # of rank 1
    launch(6)
    assert read_all(folder) == read_all(whole)
    (folder / "summary.json").unlink()  # as if killed before the final step: nothing is left to draw
    launch(6)
    assert json.loads((folder / "summary.json").read_text())["peak_memory_bytes"] == 2001
    assert read_all(folder) == read_all(whole)


class Crash(BaseException):
    pass


class CrashAt:
    """Raises before or after the k-th change to the disk, as a kill would."""

    def __init__(self, monkeypatch, step):
        self.left = step
        for name in ("mkdir", "replace", "fsync", "write", "unlink", "ftruncate"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            if sys._getframe(1).f_globals["__name__"].startswith("filelock"):
                return function(*args, **kwargs)  # a kill releases the lock; an exception there may leak it
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def tick(self):
        self.left -= 1
        if self.left == 0:
            raise Crash


def work_through(folder, overwrite=False, label="new", count=3):
    """Writes a complete run without a Trainer; returns the prompts that were drawn."""
    run_folder = RunFolder(folder)
    try:
        finished = run_folder.claim({"label": label}, overwrite)
        run_folder.open_shard(0)
        drawn = [p for p in range(count) if p not in finished]
        for p in drawn:
            row = {**ROW, "prompt_index": p}
            run_folder.write([(row, f"{label} {p}".encode())], [trace(p, 0)], peak=100 * count + p)
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
            work_through(folder, label="old", count=4)
        with monkeypatch.context() as patch:
            crash = CrashAt(patch, steps)
            try:
                work_through(folder, overwrite)
            except Crash:
                whole_rows = [line for path in folder.glob("results*.jsonl") for line in path.read_text().splitlines()]
                traced = [
                    json.loads(line) for path in folder.glob("trace*.jsonl") for line in path.read_text().splitlines()
                ]
                assert all(trace(json.loads(line)["prompt_index"], 0) in traced for line in whole_rows)
        if crash.left > 0:
            break
        removing = (folder / ".overwriting").exists()  # so any rows are those of the old run
        try:
            drawn = work_through(folder)
        except RunError:  # the old configuration is still there: needs --overwrite again
            assert overwrite
            drawn = work_through(folder, overwrite)
        else:
            recorded = set() if removing else {json.loads(line)["prompt_index"] for line in whole_rows}
            assert set(drawn) == set(range(3)) - recorded, "a finished image was drawn again, or a missing one was not"
        assert sorted((path.name, path.read_bytes()) for path in folder.rglob("[!.]*.*")) == expected
    assert steps > 50


def test_names_of_images():
    assert image_name(12, 3) == "images/000012-03.png"
    assert image_name(2500, 0, 4) == "images/0001/002500-00.png"
    assert image_name(10_234, 0) == "images/0001/010234-00.png"
    assert image_name(3332, 2, 3) == "images/003332-02.png"
    assert image_name(3333, 0, 3) == "images/0001/003333-00.png"
    assert image_name(5, 12_000, 20_000) == "images/0005/000005-12000.png"


def test_many_images_go_to_subfolders(tmp_path):
    folder = tmp_path / "run"
    prompts = [0, 4999, 5000, 5001]  # two images each: 10,000 to a folder

    def launch(some, overwrite=False):
        writer, module = RunWriter(folder, CONFIG, overwrite), Tiny()
        finished = writer.open()
        predict(writer, module, [p for p in some if p not in finished])
        return module.drawn

    assert launch(prompts[:3]) == prompts[:3]
    torn = folder / "images/0001/005000-01.png"
    torn.write_bytes(torn.read_bytes()[:-1])
    torn.with_name("005001-00.png.tmp").write_bytes(b"half")
    assert launch(prompts) == [5000, 5001]
    names = {f"images/{'0001/' * (p >= 5000)}{p:06d}-{k:02d}.png" for p in prompts for k in range(2)}
    assert {path.relative_to(folder).as_posix() for path in folder.glob("images/**/*.*")} == names
    assert {row["file"] for row in read_rows(folder)} == names
    (folder / "images/0001/mine.txt").write_text("mine")
    assert launch([0], overwrite=True) == [0]
    left = {path.relative_to(folder).as_posix() for path in folder.glob("images/**/*.*")}
    assert left == {"images/000000-00.png", "images/000000-01.png", "images/0001/mine.txt"}


def test_large_runs_are_read_in_parts(tmp_path):
    folder = tmp_path / "run"
    parts = []

    class Record(Tiny):
        def record(self, rows):
            parts.append([row["prompt_index"] for row in rows])
            super().record(rows)

    writer = RunWriter(folder)
    writer.open()
    lines = [json.dumps({"prompt_index": p, "rewards": {"r": 0.5}, "file": "x"}) for p in range(2500)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    predict(writer, Record(), [])
    assert [len(part) for part in parts] == [1024, 1024, 452]
    assert [index for part in parts for index in part] == list(range(2500))


def test_the_names_of_the_files_are_spelled_once():
    """The package's code, docstrings excluded, contains each file name once."""
    spelled = []
    for path in Path(svdd.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = {id(node.body[0].value) for node in nodes if node.body and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                spelled += re.findall(r"(?:results|trace|failed)\.jsonl|summary\.json|config\.yaml", node.value)
    assert sorted(spelled) == ["config.yaml", "failed.jsonl", "results.jsonl", "summary.json", "trace.jsonl"]


WITHOUT_FCNTL = """
import importlib, pkgutil, sys
sys.modules["fcntl"] = None
import svdd
for module in pkgutil.walk_packages(svdd.__path__, "svdd."):
    if module.name != "svdd.__main__":
        importlib.import_module(module.name)
assert "svdd.runs.writer" in sys.modules and "svdd.commands.predict" in sys.modules
"""


@pytest.mark.slow
def test_every_module_can_be_imported_without_fcntl():
    """Windows has no fcntl."""
    root = Path(__file__).parents[1]
    process = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL], capture_output=True, text=True, cwd=root)
    assert process.returncode == 0, process.stderr[-3000:]
    assert not [path for path in (root / "svdd").rglob("*.py") if "fcntl" in path.read_text(encoding="utf-8")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_is_released_when_its_process_is_killed_but_a_child_lives(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from svdd.runs.files import lock
held = lock(Path(sys.argv[1]), "held")
child = os.fork()
if not child:
    print(os.getpid(), flush=True)  # it has let go of the lock
time.sleep(100)
"""
    path = tmp_path / "lock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(RunError, match=f"held .process {process.pid} on .*; wait for it, or choose another"):
                lock(path, "held")
            process.kill()
            process.wait()
            os.kill(child, 0)  # it is alive
            lock(path, "held").release()
        finally:
            os.kill(child, signal.SIGKILL)
