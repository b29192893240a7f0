"""`svdd calibrate`: the numbers against definitions, the chains against plain ones, the files."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from svdd.__main__ import main
from svdd.calibration import measure, plot, write
from svdd.data import Prompt
from svdd.module import GuidedDiffusion
from svdd.samplers.unguided import Unguided
from svdd.values.posterior_mean import PosteriorMean
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, run


def ranks(numbers) -> np.ndarray:
    return np.argsort(np.argsort(np.asarray(numbers)))


def test_the_numbers_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, generator=generator, dtype=torch.float64)
    values = rewards[:, None] * torch.tensor([0.1, 2.0]) + torch.randn(40, 2, generator=generator, dtype=torch.float64)
    prompts = torch.arange(10).repeat_interleave(4)
    table = measure(values, rewards, prompts)
    assert [row["step"] for row in table] == [1, 2]
    for row, v in zip(table, values.T.numpy(), strict=True):
        r = rewards.numpy()
        assert row["pearson"] == pytest.approx(np.corrcoef(v, r)[0, 1])
        assert row["spearman"] == pytest.approx(np.corrcoef(ranks(v), ranks(r))[0, 1], abs=1e-6)
        assert row["bias"] == pytest.approx((v - r).mean())
        assert row["rmse"] == pytest.approx(np.sqrt(((v - r) ** 2).mean()))
        assert row["explained_variance"] == pytest.approx(1 - np.var(r - v) / np.var(r))
        inner = [x - x.reshape(10, 4).mean(1).repeat(4) for x in (v, r)]
        assert row["spearman_within"] == pytest.approx(np.corrcoef(*map(ranks, inner))[0, 1], abs=1e-6)


def test_one_chain_per_prompt_has_no_spread_within():
    table = measure(torch.randn(5, 1).double(), torch.randn(5).double(), torch.arange(5))
    assert np.isnan(table[0]["spearman_within"])
    assert table[0]["spearman"] == table[0]["spearman"]


def test_an_exact_value_is_found_to_be_one():
    """The exact soft value of a nearly flat tilt is the expected reward: no bias, and variance explained as known."""
    diffusion, reward = GaussianDiffusion(4), Linear([0.6, -0.8])
    model = GuidedDiffusion(reward, diffusion, Unguided(), ExactSoftValue(1e6), images_per_prompt=4)
    model.on_test_epoch_start()
    model.test_step([Prompt(p, "", None, None, {}) for p in range(500)], 0)
    rows = torch.cat(model._seen)
    plain = run(diffusion, Unguided(), model.value, 2000)
    torch.testing.assert_close(rows[:, -1], plain.scores(reward).double())  # the chains that predict would draw
    table = measure(rows[:, 2:-1], rows[:, -1], rows[:, 0].long())
    total = diffusion.end_law()[1]
    for i, row in enumerate(table, start=1):
        assert row["bias"] == pytest.approx(0, abs=4 * (total / 2000) ** 0.5)
        assert row["explained_variance"] == pytest.approx(1 - diffusion.end(i)[2] / total, abs=0.05)
    assert [row["spearman"] for row in table] == sorted(row["spearman"] for row in table)


@pytest.fixture
def calibrate(sd15, tmp_path):
    """Measures nine chains of a random model into the folder c; `words` is the command line without that folder."""
    words = ["calibrate", "--model.reward", "Compressibility", "--model.diffusion.pretrained", sd15]
    words += ["--model.diffusion.num_inference_steps", "4", "--model.images_per_prompt", "3"]
    words += ["--data.prompts", '["apple", "panda", "car"]', "--data.batch_size", "2", "--trainer.accelerator", "cpu"]

    def run(*arguments: str) -> int:
        return main([*words, "--output", str(tmp_path / "c"), *arguments])

    run.words = words
    return run


def test_the_command_writes_table_and_plot(calibrate, tmp_path, capsys):
    assert calibrate() == 0
    out = capsys.readouterr().out
    assert "spearman_within" in out
    with open(tmp_path / "c" / "calibration.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    about = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert (about["value"], about["reward"], about["chains"]) == ("PosteriorMean", "Compressibility", 9)
    assert len(about["steps"]) == 3
    with Image.open(tmp_path / "c" / "calibration.png") as picture:
        assert picture.width > 500


def test_what_is_not_a_number_is_null(tmp_path):
    table = measure(torch.randn(5, 2).double(), torch.randn(5).double(), torch.arange(5))
    write(tmp_path, table, {"value": "x"})
    assert json.loads((tmp_path / "calibration.json").read_text())["steps"][0]["spearman_within"] is None
    assert plot(tmp_path / "p.png", {"a": table, "b": table}, "title")


def test_values_at_the_end_are_not_asked_for():
    model = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(3), value=PosteriorMean())
    model.on_test_epoch_start()
    model.test_step([Prompt(0, "", None, None, {})], 0)
    assert model._seen[0].shape == (1, 2 + 2 + 1)


@pytest.fixture
def one_thread():
    """How many threads share a sum decides its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["apple", "panda", "car"], ["apple"]], ids=["uneven shares", "an empty share"])
def test_two_processes_measure_what_one_does(calibrate, one_thread, tmp_path, prompts):
    words = ["--data.prompts", json.dumps(prompts), "--data.batch_size", "1"]
    assert calibrate(*words, "--output", str(tmp_path / "one")) == 0
    words += ["--output", str(tmp_path / "two"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "svdd", *calibrate.words, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two"))
    assert one["chains"] == two["chains"] == 3 * len(prompts)
    assert one["steps"] == two["steps"]
