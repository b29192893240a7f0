"""Estimates: a rehearsed batch costs what the batch itself does, and a dry run writes nothing."""

import re

import pytest
import torch

from svdd.__main__ import main
from svdd.commands.estimate import estimate
from svdd.commands.rehearsal import rehearsed
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.prompts import Prompt
from svdd.samplers.rollover_budget import RolloverBudget
from svdd.samplers.svdd import SVDD
from svdd.values.lookahead import Lookahead
from svdd.values.posterior_mean import PosteriorMean
from svdd.values.screened import Screened
from tests.analytic import GaussianDiffusion, Linear
from tests.test_samplers import SAMPLERS, label

PROMPTS = [Prompt(k, str(k), None, None, {}) for k in range(5)]


class Clock:
    """A clock that work moves: each call takes some seconds, and some for each row."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, rows: int, each: float) -> None:
        self.now += 0.2 + each * rows


class TimedDiffusion(GaussianDiffusion):
    def __init__(self, num_inference_steps, clock):
        super().__init__(num_inference_steps)
        self.clock = clock

    def denoise(self, x, *rest):
        self.clock.work(len(x), 0.5)
        return super().denoise(x, *rest)

    def decode(self, x0):
        self.clock.work(len(x0), 0.3)
        return super().decode(x0).sigmoid()  # pictures can be written


class TimedReward(Linear):
    def __init__(self, clock):
        super().__init__([0.7, -0.4])
        self.clock = clock

    def forward(self, images, prompts):
        self.clock.work(len(images), 0.1)
        return super().forward(images, prompts)


def timed(sampler, value=None, steps=12):
    clock = Clock()
    model = GuidedDiffusion(TimedReward(clock), TimedDiffusion(steps, clock), sampler, value, images_per_prompt=2)
    return model, clock


@pytest.mark.parametrize("value", [PosteriorMean(), Lookahead(2), Screened(Lookahead(1), PosteriorMean(), 2)], ids=type)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_an_estimate_equals_the_run(sampler, value):
    """In time, by a clock that work moves, and in every count of the ledger, for every sampler.

    Except for RolloverBudget, whose values decide in which steps it draws, and for how many images at once.
    """
    try:
        model, clock = timed(sampler, None if isinstance(value, PosteriorMean) else value)
    except ValueError as error:
        return pytest.skip(str(error)) if not isinstance(value, PosteriorMean) else pytest.fail(str(error))
    found = estimate(model, PROMPTS, 2, clock=clock)
    begin, rows = clock.now, model.predict(PROMPTS[:2]).rows
    tolerance = 0.3 if isinstance(sampler, RolloverBudget) else 0.03
    assert found.seconds == pytest.approx((clock.now - begin) * 5 / 2, rel=tolerance)
    counts = {name: number for name, number in rows[0]["ledger"].items() if not name.endswith("_seconds")}
    assert found.per_image == (counts if tolerance < 0.1 else pytest.approx(counts, rel=tolerance))
    assert found.images == 5 * len(rows) / 2
    assert found.denoiser_rows == found.images * found.per_image["denoiser_rows"]


def test_a_rehearsal_computes_each_kind_of_work_a_few_times():
    model, clock = timed(SVDD(5), steps=20)
    estimate(model, PROMPTS, 2, clock=clock)
    rows = model.diffusion.denoised_rows
    assert rows[:4] == [4, 4, 20, 20]  # each kind once to warm up, once for its time
    assert rows[4:] == [4] * 20  # the plainly drawn pictures, of which the size of a file is known
    rows.clear()
    with rehearsed(model, clock), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    model.predict(PROMPTS[:2])  # the real chunker is back
    assert len(rows) == 20


def test_the_time_of_compilation_is_not_counted():
    model, clock = timed(SVDD(5), steps=20)
    expected = estimate(model, PROMPTS, 2, clock=clock)
    model, clock = timed(SVDD(5), steps=20)
    model.diffusion.compiled, plain, known = True, model.diffusion.denoise, set()

    def compiled(x, *rest):
        clock.now += 0 if len(x) in known else 100  # more than a call that is not repeated may take
        known.add(len(x))
        return plain(x, *rest)

    model.diffusion.denoise = compiled
    found = estimate(model, PROMPTS, 2, clock=clock)
    assert (found.seconds, found.per_image) == (pytest.approx(expected.seconds), expected.per_image)


def test_slow_pictures_are_not_drawn_and_slow_calls_not_repeated():
    model, clock = timed(SVDD(5), steps=40)
    model.diffusion.clock.work = lambda rows, each: setattr(clock, "now", clock.now + 25)
    found = estimate(model, PROMPTS, 2, clock=clock)
    assert model.diffusion.denoised_rows == [4, 20, 4]
    assert found.seconds == pytest.approx(
        5 / 2 * 25 * (40 + 40 + 40 + 1)
    )  # steps, decodes, rewards; and the last score
    assert found.disk_bytes > 1000


def test_memory_that_ran_out_in_a_rehearsal_lowers_the_chunk_size():
    model, clock = timed(SVDD(5))
    denoise = model.diffusion.denoise

    def scarce(x, *rest):
        if len(x) > 10:
            raise torch.OutOfMemoryError
        return denoise(x, *rest)

    model.diffusion.denoise = scarce
    with pytest.warns(UserWarning, match="chunk_size is now 10"):
        found = estimate(model, PROMPTS, 2, clock=clock)
    begin = clock.now
    model.predict(PROMPTS[:2])
    assert found.seconds == pytest.approx((clock.now - begin) * 5 / 2, rel=0.05)


def test_a_dry_run_says_what_is_left_and_writes_nothing(sd15, prompts_file, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["predict", "--model.reward", "Compressibility", "--model.diffusion.pretrained", sd15]
    words += ["--model.diffusion.num_inference_steps", "3", "--model.sampler.num_candidates", "2"]
    words += ["--data.prompts", str(prompts_file), "--data.batch_size", "1", "--trainer.accelerator", "cpu"]
    words += ["--output", str(run), "--trainer.devices"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert main([*words, "2", "--dry_run", "true"]) == 0
    text = capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not run.exists()
    assert re.search(r"^images +3$", text, re.M)
    assert re.search(r"^denoiser rows +5 +15$", text, re.M)
    assert re.search(r"^network rows +10 +30$", text, re.M)
    assert "on each of 2 devices for all 3 prompts" in text
    assert re.search(r"^memory: .* above the loaded model$", text, re.M)
    assert re.search(r"^disk: [\d.]+ kB$", text, re.M)
    assert main([*words, "1", "--trainer.limit_predict_batches", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words, "1", "--dry_run", "true", "--model.sampler.num_candidates", "3"]) == 2
    assert "model.sampler.num_candidates was 2, now 3" in capsys.readouterr().err
    assert main([*words, "1", "--dry_run", "true"]) == 0
    assert "for the 2 that are left (1 are done)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
