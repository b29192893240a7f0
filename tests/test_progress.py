"""Progress: what is shown of a run, by a clock that work moves."""

import io
import itertools
import re
from types import SimpleNamespace

import lightning as L
import pytest

import svdd.commands.progress
from svdd.__main__ import main
from svdd.commands.progress import Pace, ProgressBars, ProgressLines, duration
from svdd.runs.prompts import PromptDataModule
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.evolutionary_search import EvolutionarySearch
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.refinement import Refinement
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from tests.test_estimate import timed
from tests.test_samplers import label

SAMPLERS = [
    Unguided(),
    BestOfN(4),
    SVDD(5),
    SMC(3, returns="all"),
    EvolutionarySearch(2, 3),
    Refinement(2, 0.4, 0.7, SVDD(3)),
    RolloverBudget(5, 3),
    NoiseOptimisation(3),
]
LINE = re.compile(
    r"svdd: cell 3 of 7: (\d+)%, (\d+) of (\d+) images \(\d+ done earlier\)(?:, (\S+) s an image, (.*) left)?"
)


def draw(model, callback, prompts=7):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    callbacks = callback if isinstance(callback, list) else [callback]
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, inference_mode=False, **quiet)
    data = PromptDataModule([str(k) for k in range(prompts)], batch_size=3)
    trainer.predict(model, data, return_predictions=False)


class Watch(L.Callback):
    """Notes the clock, and what a callback before it has counted, at every step and batch."""

    def __init__(self, pace_of, clock):
        self.pace_of, self.clock, self.seen = pace_of, clock, []

    def on_predict_start(self, trainer, pl_module):
        self.begin, follow = self.clock(), pl_module.on_step

        def step(i, value):
            follow(i, value)
            self.look()

        pl_module.on_step = step

    def look(self):
        self.seen.append((self.clock(), self.pace_of().done, self.pace_of().left, self.pace_of().batch_seconds))

    def on_predict_batch_end(self, *args):
        self.look()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_progress_never_goes_back_and_predicts_the_end(sampler):
    """Also of samplers that run the chain several times."""
    model, clock = timed(sampler)
    lines = ProgressLines(clock=clock)
    watch = Watch(lambda: lines._pace, clock)
    draw(model, [lines, watch])
    end = clock()
    done = [each for _, each, _, _ in watch.seen]
    assert done == sorted(done)
    returned = 3 if isinstance(sampler, SMC) else 1
    assert done[-1] == lines._pace.images == 7 * 2 * returned
    first_batch = [each for each in watch.seen if 0 < each[1] < 3 * 2 * returned]
    if not isinstance(sampler, NoiseOptimisation):  # whose rows are known when a whole run of the chain is done
        assert len(first_batch) > 5
    known = [(now, left) for now, share, left, _ in watch.seen if share > 0.2 * lines._pace.images]
    for now, left in known:
        assert now + left - watch.begin == pytest.approx(end - watch.begin, rel=0.25)
    assert model.on_step is None


def test_lines_come_every_thirty_seconds_or_five_percent(capsys):
    model, clock = timed(SVDD(5), steps=40)
    said = []
    lines = ProgressLines(earlier=4, label="cell 3 of 7: ", clock=clock)
    show = lines._show

    def noted():
        show()
        if text := capsys.readouterr().err:
            said.append((clock(), lines._pace.done, text))

    lines._show = noted
    begin = clock()
    draw(model, lines)
    assert len(said) >= 20
    for (before, share, _), (now, following, _) in itertools.pairwise([(begin, 0.0, ""), *said]):
        assert now - before >= 30 or (following - share >= 0.05 * 14 and now - before >= 1)
    for now, share, text in said:
        found = LINE.match(text)
        assert [int(found[k]) for k in (1, 2, 3)] == [round(100 * (share + 8) / 22), int(share) + 8, 14 + 8]
        assert float(found[4]) == pytest.approx((now - begin) / share, rel=0.01)  # what was skipped is not in the rate
    assert ", mean TimedReward " not in said[0][2]
    assert re.search(r", mean TimedReward -?\d\.\d+$", said[-1][2])


def test_bars_have_an_estimate_before_the_first_batch_ends_and_a_clock_for_each_batch(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert isinstance(svdd.commands.progress.progress(), ProgressBars)
    model, clock = timed(SVDD(2))
    draw(model, ProgressBars(clock=clock), prompts=5)
    text = terminal.getvalue()
    whole = [(int(share), int(done), left) for share, done, left in re.findall(
        r"(\d+)%\|[^|\r]*\| (\d+) of 10 images(?:, \S+ s an image, (\S+) left)?", text)]  # fmt: skip
    assert [share for share, _, _ in whole] == sorted(share for share, _, _ in whole)
    assert any(left and done < 6 for _, done, left in whole)
    assert whole[-1] == (100, 10, "0:00")
    clocks = [int(m) * 60 + int(s) for m, s in re.findall(r"step \d+ of 12(?:, mean value \S+)?, (\d+):(\d+)", text)]
    restarts = [k for k, (before, now) in enumerate(itertools.pairwise(clocks)) if now < before]
    assert len(restarts) == 1  # at the second batch
    assert max(len(line) for line in re.split(r"[\r\n]|\x1b\[A", text)) <= 80


def test_the_clock_of_an_image():
    now = 100.0
    pace = Pace(10, lambda: now)
    assert (pace.seconds_each, pace.left) == (None, None)
    pace.begin_batch(4)
    now = 106.0
    pace.advance(0.75)
    assert (pace.done, pace.seconds_each, pace.left, pace.batch_seconds) == (3, 2, 14, 6)
    pace.advance(0.5)  # the batch is drawn again
    assert pace.done == 3
    pace.end_batch()
    now = 108.0
    pace.begin_batch(6)
    assert (pace.done, pace.seconds_each, pace.left, pace.batch_seconds) == (4, 2, 12, 0)
    assert [duration(each) for each in (0.4, 65, 7384, 90000, 200000)] == [
        "0:00", "1:05", "2:03:04", "1 day 1:00:00", "2 days 7:33:20",
    ]  # fmt: skip


def test_one_of_several_processes_says_whose_images_it_counts(capsys):
    model, clock = timed(Unguided())
    lines = ProgressLines(earlier=100, clock=clock)
    dataset = SimpleNamespace(num_prompts=5)
    trainer = SimpleNamespace(world_size=4, global_rank=0, predict_dataloaders=SimpleNamespace(dataset=dataset))
    lines.on_predict_start(trainer, model)
    lines.on_predict_batch_start(trainer, model, range(5))
    clock.now += 31
    lines._show()
    assert capsys.readouterr().err == "svdd: 0%, 0 of 10 images of process 0 of 4 (200 done earlier)\n"


def test_a_command_is_silent_if_wanted_and_counts_what_it_skips(sd15, prompts_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(svdd.commands.progress, "_LEAST", 0.0)
    words = ["predict", "--model.reward", "Compressibility", "--model.diffusion.pretrained", sd15]
    words += ["--model.diffusion.num_inference_steps", "3", "--model.sampler", "Unguided", "--data.batch_size", "1"]
    words += ["--data.prompts", str(prompts_file), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    words += ["--output", str(tmp_path / "run"), "--trainer.limit_predict_batches", "1"]
    capsys.readouterr()
    assert main([*words, "--trainer.enable_progress_bar", "false"]) == 0
    assert "images (" not in capsys.readouterr().err
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 3 images (1 done earlier), " in line]
    assert len(lines) == 3  # steps of the only batch
    assert main([*words, "--trainer.callbacks+=TQDMProgressBar"]) == 0
    assert "done earlier" not in capsys.readouterr().err
