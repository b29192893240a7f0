"""A batch is encoded and written while the next one is drawn: order, atomicity, errors and the end of the thread."""

import json
import os
import shutil
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from svdd import UserError
from svdd.commands.cells import _AssistantCLI
from svdd.runs.assistant import AssistantWriter
from svdd.runs.folder import RunFolder
from svdd.runs.prediction import Prediction
from svdd.runs.writer import RunError, RunWriter
from tests.faults.harness import _die_after
from tests.test_writer import CONFIG, ROW, Tiny, image, predict, read_all, read_rows, run, trace


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three batches."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return read_all(folder)


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("svdd-writer", "svdd-png"))]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


def written(folder):
    """The prompts in the shard, in the order in which they were written."""
    lines = (folder / "results-00000.jsonl").read_bytes().splitlines()
    return [json.loads(line)["prompt_index"] for line in lines]


def test_the_next_batch_begins_before_the_last_one_is_written(tmp_path, whole, monkeypatch):
    """And only the next one; at the end the files are the same, in the same order."""
    folder, begun, seen = tmp_path / "run", [threading.Event() for _ in range(3)], []
    write = RunFolder.write

    def held_up(self, images, *entries):
        following = len(seen)
        assert following == len(begun) or begun[following].wait(60), "the next batch waits for this one"
        write(self, images, *entries)

    class Watched(Tiny):
        def predict_step(self, batch, batch_idx):
            seen.append(written(folder))
            begun[batch_idx].set()
            return super().predict_step(batch, batch_idx)

    monkeypatch.setattr(RunFolder, "write", held_up)
    writer = RunWriter(folder, CONFIG)
    writer.open()
    predict(writer, Watched(), range(6))
    assert seen[:2] == [[], []]
    assert seen[2] == [0, 0, 1, 1]  # a third batch never begins before the first one is on disk
    assert read_all(folder) == whole


TRAINER = SimpleNamespace(global_rank=0, is_global_zero=True, strategy=SimpleNamespace(barrier=lambda name: None))


def hooks(writer, module, *names):
    return [partial(getattr(writer, f"on_{name}"), TRAINER, module) for name in names]


def fork(function):
    """Runs a function in a fork of this process; returns its exit code."""
    if (child := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("tar", [False, True])
def test_a_kill_at_any_point_leaves_whole_batches_in_order(tmp_path, whole, tar):
    """At one file operation of many; the same command then completes the run."""

    def draw(folder, operations=None):
        writer = RunWriter(folder, CONFIG, tar=tar)
        prompts = [p for p in range(6) if p not in writer.open()]
        if operations is not None:
            _die_after(operations, str(folder))
        module = Tiny()
        for hook in (module.on_predict_start, *hooks(writer, module, "predict_start", "predict_epoch_start")):
            hook()  # as the Trainer does, which takes longer than the run
        for start in range(0, len(prompts), 2):
            batch = prompts[start : start + 2]
            writer.on_predict_batch_end(TRAINER, module, module.predict_step(batch, start // 2))
        for hook in (*hooks(writer, module, "predict_epoch_end"), module.on_predict_epoch_end):
            hook()
        writer.on_predict_end(TRAINER, module)
        writer.close()
        return module.drawn

    ends, operations = [], 3
    while True:
        folder = tmp_path / str(operations)
        code = fork(lambda: draw(folder, operations))  # noqa: B023
        finished = RunFolder(folder).finished()
        ends.append(len(finished))
        assert finished == set(range(ends[-1]))
        if code == 0:
            break
        assert code == 137
        assert ends[-1] % 2 == 0
        if ends[-1] not in ends[:-1]:
            assert draw(folder) == list(range(ends[-1], 6))
            rows = [{name: row[name] for name in row if name not in ("file", "sha256")} for row in read_rows(folder)]
            assert [row["prompt_index"] for row in rows] == [p for p in range(6) for _ in range(2)]
            assert tar or read_all(folder) == whole
        operations += 5 if tar else 11
    assert ends == sorted(ends)
    assert {0, 2, 4, 6} <= {*ends}


class Spoiled(Tiny):
    """Its batch `at` cannot be written; `then` is what the next batch does."""

    def __init__(self, folder, at, how, then=None):
        super().__init__()
        self.folder, self.at, self.how, self.then = folder, at, how, then

    def predict_step(self, batch, batch_idx):
        if self.then and batch_idx == self.at + 1:
            raise self.then
        prediction = super().predict_step(batch, batch_idx)
        if batch_idx == self.at:
            for thread in threading.enumerate():  # the batch before is not the one that fails
                if thread.name == "svdd-writer":
                    thread.join()
            self.how(self.folder, prediction)
        return prediction


def lose_the_shard(folder, prediction):
    (folder / "results-00000.jsonl").unlink()


def lose_the_folder(folder, prediction):
    shutil.rmtree(folder)


def garble_a_row(folder, prediction):
    prediction.rows[1]["num_images"] = 0


def garble_a_text(folder, prediction):
    prediction.rows[1]["prompt"] = None


def leave_the_range(folder, prediction):
    prediction.images[1, 0, 0, 0] = 1.5


@pytest.mark.parametrize(
    ("hook", "how", "error", "message"),
    [
        ("batch end", leave_the_range, ValueError, r"must lie in \[0, 1\], got values from .* to 1\.5"),
        ("batch end", lose_the_folder, RunError, "cannot write the run to .*images.*what is finished is kept"),
        ("epoch end", lose_the_shard, RunError, r"results-00000\.jsonl: the file was removed while it was written"),
        ("epoch end", garble_a_row, ValueError, "num_images > image_index >= 0, got"),
        ("exception", garble_a_row, ValueError, "num_images > image_index >= 0, got"),
        ("close", lose_the_folder, RunError, "cannot write the run to .*images.*what is finished is kept"),
        ("close", garble_a_text, AttributeError, "encode"),
    ],
)
def test_an_error_of_the_writer_ends_the_run_at_the_next_hook(tmp_path, whole, hook, how, error, message):
    """With its own message, also if something else fails meanwhile; what was written before stays."""
    folder = tmp_path / "run"
    at, then = (2, None) if hook == "epoch end" else (1, None) if hook == "batch end" else (1, RuntimeError("other"))
    writer, module = RunWriter(folder, CONFIG), Spoiled(folder, at, how, then)
    writer.open(hold=hook == "close")
    immediate = how is leave_the_range  # before the batch is handed over
    with pytest.raises(RuntimeError if hook == "close" else error) as caught:
        predict(writer, module, range(6))
    if hook == "close":
        assert caught.value is then
        with pytest.raises(error, match=message) as caught:
            writer.close()
    assert caught.match(message)
    if hook == "exception":
        assert caught.value.__context__ is then
    writer.close()  # raises the error only once
    drawn = 2 * (at + 1) + (2 if hook == "batch end" and not immediate else 0)
    assert module.drawn == list(range(drawn))
    if how in (garble_a_row, garble_a_text, leave_the_range):
        assert run(folder).drawn == list(range(2 * at, 6))
    else:  # what was written before is gone too
        assert run(folder).drawn == list(range(6))
    assert read_all(folder) == whole


def test_a_helper_of_a_study_asks_for_more_only_if_its_batch_is_on_disk(tmp_path):
    """Its owner counts a batch as finished when the next one is asked for, and would not draw it again."""
    folder = tmp_path / "run"
    RunFolder(folder).claim({})
    asked, rows = [], []
    helper = object.__new__(_AssistantCLI)
    helper._name, helper._drawn, helper._count = "cell", rows, 0
    helper.writer = AssistantWriter(folder, 1, None, False, rows)
    helper.watchdog = SimpleNamespace(progress=lambda: None)
    helper._link = SimpleNamespace(ask=lambda *message, waiting: (asked.append(message), ([1], []))[1])
    module = torch.nn.Identity()
    helper.writer.on_predict_start(TRAINER, module)

    def end_batch():
        row = {**ROW, "seed": 1}
        helper.writer.on_predict_batch_end(TRAINER, module, Prediction(image(0, 0)[None], [row], [trace(0, 0)]))

    end_batch()
    assert helper._take() == [1]
    assert asked == [("take", "cell", [{**ROW, "seed": 1}])]
    assert len((folder / "results-00001.jsonl").read_bytes().splitlines()) == 1
    shutil.rmtree(folder)
    end_batch()
    with pytest.raises(UserError, match="cannot write the run to"):
        helper._take()
    assert len(asked) == 1
    helper.writer.close()
