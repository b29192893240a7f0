"""`svdd calibrate`: its numbers against their definitions, its chains against plain ones, and its files."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from svdd import UserError
from svdd.__main__ import main
from svdd.commands.calibrate import CalibrateCLI
from svdd.runs.prompts import Prompt
from svdd.samplers.unguided import Unguided
from svdd.values.base import Value
from svdd.values.training.allocation import allocate, expected_maximum, reliability, shrink
from svdd.values.training.calibration import Calibration, measure, plot, write
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, run
from tests.faults.harness import run_in_two
from tests.test_samplers import largest_of


def ranks(numbers) -> np.ndarray:
    return np.argsort(np.argsort(np.asarray(numbers)))


def test_the_numbers_match_their_definitions():
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


def test_an_exact_value_has_no_bias():
    """For a nearly flat tilt the exact soft value has no bias and explains the known share of the variance."""
    diffusion, reward = GaussianDiffusion(4), Linear([0.6, -0.8])
    model = Calibration(reward, diffusion, ExactSoftValue(1e6), images_per_prompt=4)
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


# ---- candidates per step


class Along(Value):
    """The value b . x of the noisy latent."""

    def __init__(self, b):
        super().__init__()
        self.b = torch.tensor(b, dtype=torch.float64)

    def estimate(self, state):
        return state.x.flatten(1) @ self.b


@pytest.mark.parametrize("value", [ExactSoftValue(1e6), Along([1.4, -0.2]), Along([0.8, 0.6])])
def test_spread_and_reliability_match_the_gaussian_chain(value):
    """A value v = u . x has the spread |u| std among children, and the slope (A u . b) / |u|^2 of the final reward."""
    diffusion, b = GaussianDiffusion(5), torch.tensor([0.6, -0.8], dtype=torch.float64)
    model = Calibration(Linear(b.tolist()), diffusion, value, images_per_prompt=3, candidates=8, average_candidates=6)
    model.test_step([Prompt(p, "", None, None, {}) for p in range(700)], 0)
    torch.testing.assert_close(
        model._seen[0][:, 6], run(diffusion, Unguided(), model.value, 2100).scores(model.reward).double()
    )  # candidates do not change the chains
    own, mean, std = model._seen[0][:, 2:].chunk(3, 1)
    slopes, errors = reliability(own, mean, std, 8, own[:, -1], model._seen[0][:, 0].long())
    gain = torch.tensor([diffusion.end(i + 1)[0] for i in range(5)], dtype=torch.float64)
    noise = torch.tensor([diffusion.std(i) for i in range(5)], dtype=torch.float64)
    u = [value.b if isinstance(value, Along) else b * float(gain[i]) for i in range(4)] + [b]
    size = torch.stack([each.norm() for each in u])
    torch.testing.assert_close(std.square().mean(0).sqrt(), size * noise, rtol=0.05, atol=0)
    covariance = gain * torch.stack([each @ b for each in u]) * noise**2
    for i in range(5):
        near = slice(max(0, i - 1), i + 2)  # pooled with both neighbours
        expected = float(covariance[near].sum() / ((size * noise) ** 2)[near].sum())
        assert float(slopes[i]) == pytest.approx(expected, abs=4 * float(errors[i]))
    parts = [part.chunk(30) for part in (own, mean, std, own[:, -1], model._seen[0][:, 0].long())]
    few = [reliability(o, m, s, 8, r, p - p.min()) for o, m, s, r, p in zip(*parts, strict=True)]
    seen, stated = torch.stack([each[0] for each in few]).std(0), torch.stack([each[1] for each in few]).mean(0)
    torch.testing.assert_close(stated, seen, rtol=0.5, atol=0)  # of 70 chains, over 30 samples


def test_few_chains_leave_gains_bounded():
    """Where the chains' own values hardly deviate from their siblings' mean, what is left of their variance is < 0."""
    draw, prompts = torch.Generator().manual_seed(0), torch.arange(3)
    mean, rewards, near = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    std, rewards = torch.ones_like(mean), rewards[:, 0]
    for own in (mean + 0.1 * near, mean + 0.8 * near):
        slopes, errors = reliability(own, mean, std, 2, rewards, prompts)
        assert torch.stack([slopes, errors]).abs().max() < 100
        assert shrink(slopes, errors).isfinite().all()


def test_gains_shrink_towards_their_mean_by_their_share_of_error():
    gains, none = torch.tensor([4.0, 1.0, 2.5, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert shrink(gains, none).tolist() == gains.tolist()
    errors = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert shrink(gains, errors).tolist() == pytest.approx([3.0, 2.0, 2.5, 0.0])  # between = 1.5 - 1, so 2 / 3 is error
    assert shrink(gains, 5 * errors).tolist() == pytest.approx([2.5, 2.5, 2.5, 0.0])  # no evidence
    assert min(shrink(gains - 3, errors / 9).tolist()) == 0.0


def test_candidates_are_allocated_as_by_exhaustive_search():
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    for n in (2, 3, 7, 40):
        assert expected_maximum(n) == pytest.approx(largest_of(n), abs=1e-6)
    for gains in ([1.0, 2.0, 0.4], [0.3, 0.0, 0.3], [1.0, 1.0, 1.0]):
        found = allocate(gains, 9)
        totals = {
            counts: sum(gain * largest_of(m) for gain, m in zip(gains, counts, strict=True))
            for counts in itertools.product(range(1, 8), repeat=3)
            if sum(counts) == 9
        }
        assert totals[tuple(found)] == pytest.approx(max(totals.values()))
    with pytest.raises(UserError, match="does not tell the candidates of a parent apart at any step"):
        allocate([0.0, 0.0], 9)


def test_the_command_fits_candidates_that_predict_takes(calibrate, tmp_path, capsys):
    assert calibrate("--model.candidates", "3", "--model.average_candidates", "4") == 0
    assert "reliability" in capsys.readouterr().out
    fitted = tmp_path / "c" / "candidates.json"
    counts = json.loads(fitted.read_text())["model"]["sampler"]["init_args"]["num_candidates"]
    assert (len(counts), sum(counts)) == (4, 16)
    words = [*calibrate.words[1:7], "--data.prompts", "[apple]", "--trainer.accelerator", "cpu"]
    assert main(["predict", *words, "--config", str(fitted), "--output", str(tmp_path / "p")]) == 0
    trace = json.loads((tmp_path / "p" / "trace.jsonl").read_text().splitlines()[0])
    assert trace["candidates"] == [count for count in counts if count > 1]
    screened = ["--model.value", "Screened", "--model.value.cheap", "PosteriorMean", "--model.value.exact"]
    assert calibrate(*screened, "PosteriorMean", "--output", str(tmp_path / "s")) == 2
    assert "calibrate measures one value: give one part of Screened" in capsys.readouterr().err
    assert calibrate("--model.candidates", "3", "--model.diffusion.eta", "0", "--output", str(tmp_path / "s")) == 2
    assert "candidates=3 needs a chain with noise" in capsys.readouterr().err
    assert calibrate("--model.average_candidates", "1000000000", "--output", str(tmp_path / "s")) == 2
    assert "average_candidates: 1000000000 is above the limit of 10000" in capsys.readouterr().err


class ByPrompt(Value):
    """A number of the prompt: it does not tell the candidates of a parent apart."""

    def estimate(self, state):
        return state.row.float()


def test_a_table_is_written_before_the_fit_of_candidates_fails(calibrate, tmp_path, capsys):
    words = ["--model.value", "tests.test_calibration.ByPrompt", "--model.candidates", "2"]
    assert calibrate(*words, "--model.diffusion.scheduler", "ddpm") == 2  # whose last step has no noise
    told, folder = capsys.readouterr(), tmp_path / "c"
    assert re.search("not tell the candidates .* draw more chains; the table .* to .*/c, without cand", told.err)
    assert "spearman" in told.out
    assert {*folder.iterdir()} >= {folder / f"calibration.{kind}" for kind in ("json", "csv", "png")}
    assert not (folder / "candidates.json").exists()


@pytest.fixture
def calibrate(sd15, tmp_path):
    """Calibrates on nine chains of a random model, with output folder c; `words` omits that folder."""
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


def test_nan_is_written_as_null(tmp_path):
    table = measure(torch.randn(5, 2).double(), torch.randn(5).double(), torch.arange(5))
    write(tmp_path, table, {"value": "x"}, "title")
    assert json.loads((tmp_path / "calibration.json").read_text())["steps"][0]["spearman_within"] is None
    assert plot(tmp_path / "p.png", {"a": table, "b": table}, "title")


def test_values_at_the_end_are_not_evaluated():
    model = Calibration(Linear([1.0, 0.0]), GaussianDiffusion(3))
    model.test_step([Prompt(0, "", None, None, {})], 0)
    assert model._seen[0].shape == (1, 2 + 2 + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.diffusion.num_inference_steps", "1"], "num_inference_steps=1 has no step between noise and image"),
        (["--data.limit", "2", "--model.images_per_prompt", "1"], "needs at least 3 chains, better hundreds, got 2"),
    ],
)
def test_an_impossible_calibration_is_refused_before_sampling(calibrate, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(Calibration, "test_step", lambda *_: pytest.fail("a chain was drawn"))
    assert calibrate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_too_few_chains_and_constant_rewards_are_refused():
    for chains in (1, 2):
        with pytest.raises(UserError, match=f"needs at least 3 chains, better hundreds, got {chains}"):
            measure(torch.randn(chains, 2).double(), torch.randn(chains).double(), torch.arange(chains))
    with pytest.raises(UserError, match="the rewards of 4 chains do not differ: draw more, or use another reward"):
        measure(torch.zeros(4, 2).double(), torch.ones(4).double(), torch.arange(4))


def test_a_checkpoint_is_checked_before_anything_is_built(calibrate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CalibrateCLI, "instantiate_classes", lambda _: pytest.fail("the model was built"))
    header = {"identity": {"value": "LatentConvValue"}, "arguments": {}}
    (tmp_path / "whole.ckpt").write_bytes(saved({"svdd_value": header, "state_dict": {"value.w": torch.ones(500)}}))
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:700])
    (tmp_path / "other.ckpt").write_bytes(saved({"state_dict": {}}))
    (tmp_path / "tensor.ckpt").write_bytes(saved(torch.ones(2)))
    (tmp_path / "code.ckpt").write_bytes(saved({"svdd_value": Path("x"), "state_dict": {}}))
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").touch()
    for name, message in (
        ("none", "cannot be read: No such file or directory"),
        ("torn", "is not a weights file, or a damaged one"),
        ("code", "is not a weights file, or a damaged one"),
        ("text", "is not a weights file, or a damaged one"),
        ("empty", "is not a weights file, or a damaged one"),
        ("other", "holds no value of svdd"),
        ("tensor", "holds no value of svdd"),
    ):
        path = str(tmp_path / f"{name}.ckpt")
        assert calibrate("--ckpt_path", path) == 2
        error = capsys.readouterr().err
        assert f"pretrained={path!r} {message}; expected value.safetensors, best.ckpt or last.ckpt as written" in error
        assert error.count("\n") == 1
    assert calibrate("--ckpt_path", "http://127.0.0.1:9/value.ckpt") == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_trained_value_is_measured_from_its_checkpoint(calibrate, sd15, tmp_path):
    network = ["--model.value", "LatentConvValue", "--model.value.channels", "8", "--model.value.num_blocks", "1"]
    words = calibrate.words[1:7]  # reward, model and steps
    words += ["--data.prompts", '["apple"]', "--data.num_rollouts", "8", "--data.cache", str(tmp_path / "cache")]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--output", str(tmp_path / "value")]
    assert main(["fit", *words, *network]) == 0
    checkpoint = tmp_path / "value" / "checkpoints" / "last.ckpt"
    assert calibrate("--ckpt_path", str(checkpoint)) == 0  # the checkpoint stores class and arguments
    assert json.loads((tmp_path / "c" / "calibration.json").read_text())["value"] == "LatentConvValue"


def test_settings_of_predict_are_accepted_and_reported_as_unused(calibrate, tmp_path, capsys):
    path = tmp_path / "shared.yaml"
    sampler = {"class_path": "SVDD", "init_args": {"num_candidates": 3}}
    path.write_text(yaml.safe_dump({"model": {"sampler": sampler, "eval_rewards": ["CLIPScore"], "budget": 9}}))
    assert calibrate("--config", str(path)) == 0
    error = capsys.readouterr().err
    assert (
        "svdd: calibrate draws unguided chains and does not use model.budget, model.eval_rewards, model.sampler"
        in error
    )
    assert calibrate("--model.candidate", "3") == 2
    assert "model.candidate" in capsys.readouterr().err


def test_another_calibration_needs_overwrite(calibrate, tmp_path, capsys):
    assert calibrate() == calibrate("--data.batch_size", "3") == 0  # the same again
    first = (tmp_path / "c" / "calibration.csv").read_bytes()
    capsys.readouterr()
    assert calibrate("--model.seed", "5") == 2
    assert "holds a run with other settings: model.seed was 0, now 5. Choose" in capsys.readouterr().err
    assert (tmp_path / "c" / "calibration.csv").read_bytes() == first
    assert calibrate("--model.seed", "5", "--overwrite", "true") == 0
    assert (tmp_path / "c" / "calibration.csv").read_bytes() != first


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_of_something_else_is_left_alone(calibrate, tmp_path, capsys, overwrite):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.jsonl").touch()
    assert calibrate("--overwrite", overwrite) == 2
    assert "is not empty and is not a run folder (it holds results.jsonl); choose another" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["results.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["apple", "panda", "car"], ["apple"]], ids=["uneven shares", "an empty share"])
def test_two_processes_measure_the_same_as_one(calibrate, one_thread, tmp_path, prompts):
    words = ["--data.prompts", json.dumps(prompts), "--data.batch_size", "1"]
    assert calibrate(*words, "--output", str(tmp_path / "one")) == 0
    run_in_two([*calibrate.words, *words, "--output", str(tmp_path / "two")], tmp_path / "log.txt")
    one, two = (json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two"))
    assert one["chains"] == two["chains"] == 3 * len(prompts)
    assert one["steps"] == two["steps"]
