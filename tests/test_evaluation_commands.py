"""`svdd score`, and the evaluation of finished images by `svdd predict`, from the command line."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from svdd import Incomplete, UserError
from svdd.__main__ import main
from svdd.commands.predict import PredictCLI
from svdd.evaluation.evaluation import Evaluation
from svdd.rewards.brightness import Brightness
from svdd.rewards.z_scored import ZScored
from svdd.runs.config import write_config
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import find_pictures
from tests.faults.harness import run_in_two

PROMPTS = ["red apple", "blue car", "panda", "owl"]


def command(sd15: str, output, *arguments: str) -> list[str]:
    words = ["predict", "--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "3"]
    words += ["--data.prompts", json.dumps(PROMPTS), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    words += ["--model.sampler.num_candidates", "2"] if "Unguided" not in arguments else []
    return [*words, "--output", str(output), *arguments]


@pytest.fixture
def predict(sd15, tmp_path):
    """Samples four prompts with a random model; returns the run folder."""

    def run(name: str, *arguments: str, code: int = 0):
        assert main(command(sd15, tmp_path / name, *arguments)) == code
        return tmp_path / name

    return run


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture
def pictures(tmp_path):
    """Four uniform images: red, green, blue and white."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]):
        Image.fromarray(np.full((40, 40, 3), colour, np.uint8)).save(folder / f"{k}.png")
    (tmp_path / "texts.txt").write_text("\n".join(["warm", "cold", "cold", "warm"]))
    return folder


def test_scores_of_a_folder_are_those_of_the_reward(pictures, tmp_path, capsys, tiny_clip):
    words = ["score", "--reward", "Brightness", "--images", str(pictures), "--prompts", str(tmp_path / "texts.txt")]
    assert main([*words, "--eval_rewards+=Colorfulness", "--output", str(tmp_path / "scores")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [row["rewards"]["Brightness"] for row in rows] == pytest.approx([0.299, 0.587, 0.114, 1], abs=1e-6)
    assert [row["prompt"] for row in rows] == ["warm", "cold", "cold", "warm"]
    assert [row["prompt_index"] for row in rows] == [0, 1, 1, 0]  # two images of each prompt
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["rewards"]["Brightness"]["mean"] == pytest.approx(0.5, abs=1e-6)
    assert list(summary["rewards"]) == ["Brightness", "Colorfulness"]
    out = capsys.readouterr().out
    assert "Brightness: mean 0.5 [" in out
    assert "4 images" in out


def test_unknown_prompts_give_a_warning(pictures, tmp_path, capsys, tiny_clip):
    words = ["score", "--reward", "CLIPScore", "--reward.pretrained", tiny_clip, "--images", str(pictures)]
    for prompts, said in (([], True), (["--prompts", str(tmp_path / "texts.txt")], False)):
        assert main([*words, *prompts]) == 0
        assert ("svdd: warning: no prompts are known" in capsys.readouterr().err) == said


def test_images_of_one_prompt_are_compared_with_each_other(pictures, tmp_path, tiny_clip, capsys):
    words = ["score", "--reward", "Brightness", "--images", str(pictures), "--output", str(tmp_path / "scores")]
    words += ["--evaluation.features", tiny_clip]
    for prompts, within in (([], False), (["--prompts", str(tmp_path / "texts.txt")], True)):
        assert main([*words, *prompts]) == 0
        diversity = summary_of(tmp_path / "scores")["diversity"]
        assert diversity["vendi"] > 1
        assert (diversity["pairwise_within"] is not None) == within


def test_scores_of_a_run_are_those_in_its_rows(predict, tmp_path, tiny_clip, capsys):
    """Rounding to 8 bits in PNG files changes a CLIP score by less than 1e-3."""
    clip = json.dumps({"class_path": "CLIPScore", "init_args": {"pretrained": tiny_clip}})
    run = predict("run", "--model.reward", "Compressibility", "--model.eval_rewards", f"[{clip}]")
    words = ["score", "--reward", "CLIPScore", "--reward.pretrained", tiny_clip, "--eval_rewards+=Compressibility"]
    assert main([*words, "--images", str(run), "--output", str(tmp_path / "scores"), "--batch_size", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    for scored, drawn in zip(rows, RunFolder(run).rows(), strict=True):
        assert scored["prompt"] == drawn["prompt"]
        for name, score in drawn["rewards"].items():
            assert scored["rewards"][name] == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "Brightnes"], "unknown reward 'Brightnes'"),
        (["--reward", "Brightness", "--images", "absent"], "absent is no folder"),
        (["--reward", "Brightness", "--prompts", "one.txt"], "one.txt has 1 prompts for 4 pictures"),
        (["--reward", "Brightness", "--device", "cuda:99"], "device='cuda:99' cannot be used"),
        (["--reward", "Brightness", "--eval_rewards+=Brightness"], "rewards need distinct names"),
        (
            ["--reward", "CLIPScore", "--reward.pretrained", "./absent"],
            "CLIPScore: pretrained='./absent' is not a folder",
        ),
        (["--reward", "Brightness", "--bach_size", "3"], "bach_size"),
    ],
)
def test_a_wrong_score_command_is_one_line_and_code_2(pictures, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a\n")
    images = [] if "--images" in arguments else ["--images", str(pictures)]
    assert main(["score", *arguments, *images]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("svdd: error: ")
    assert message in line


BAD = {
    "wrong_shape": ("images.mean((1, 2))[:1]", r"returned shape [1, 64]; expected a tensor of shape [2]"),
    "not_a_number": ("[float('nan') for _ in images]", "returned NaN or infinity for 2 of 2 images, first for the"),
    "broken": ("1 / 0", "failed with ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_prompt_with_a_failing_reward_is_skipped(predict, tmp_path, monkeypatch, name):
    """The reward fails for one of four prompts: the others are sampled, and the failure is logged with its reason."""
    code, message = BAD[name]
    (tmp_path / f"{name}_rewards.py").write_text(
        f"def {name}(images, prompts):\n    return {code} if 'panda' in prompts else images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model.reward", "FunctionReward", "--model.reward.function", f"{name}_rewards.{name}"]
    with pytest.raises(Incomplete):
        predict("run", *words, "--model.on_error", "skip", "--data.batch_size", "2")
    run = tmp_path / "run"
    assert [row["prompt"] for row in RunFolder(run).rows()] == ["red apple", "blue car", "owl"]
    (failed,) = [json.loads(line) for line in (run / "failed.jsonl").read_text().splitlines()]
    assert failed["prompt"] == "panda"
    assert failed["error"].startswith("RewardError: ")
    assert message in failed["error"]
    assert summary_of(run)["rewards"][name]["count"] == 3


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_unreachable_endpoint_gives_a_one_line_error(predict, tmp_path, monkeypatch, capsys, on_error):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    judge = {"class_path": "VLMJudge", "init_args": {"endpoint": address, "model": "tiny", "retries": 0}}
    words = ["--model.reward", json.dumps(judge), "--model.on_error", on_error, "--data.limit", "2"]
    run = predict("run", *words, code=2)
    said = capsys.readouterr().err
    if on_error == "raise":
        assert f"svdd: error: endpoint {address}, model 'tiny': " in said
        return
    failed = [json.loads(line) for line in (run / "failed.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in failed] == PROMPTS[:2]
    assert all(f"endpoint {address}, model 'tiny': " in row["error"] for row in failed)
    assert "no prompt could be drawn" in said


def test_a_sum_reads_mean_and_std_from_an_unguided_run(predict):
    plain = predict("plain", "--model.reward", "Brightness", "--model.sampler", "Unguided")
    units = json.dumps(
        {"rewards": [{"class_path": "ZScored", "init_args": {"reward": "Brightness", "statistics": str(plain)}}]}
    )
    run = predict("run", "--model.reward", json.dumps({"class_path": "WeightedSum", "init_args": json.loads(units)}))
    entry, scores = summary_of(plain)["rewards"]["Brightness"], [row["rewards"] for row in RunFolder(run).rows()]
    bright = predict("bright", "--model.reward", "Brightness")
    for row, same in zip(
        scores, RunFolder(bright).rows(), strict=True
    ):  # a standardised reward guides to the same images
        assert row["WeightedSum"] == pytest.approx(
            (same["rewards"]["Brightness"] - entry["mean"]) / entry["std"], rel=1e-3
        )


def test_a_run_is_measured_against_its_baseline(predict, capsys, tiny_clip):
    """Guidance towards dark images with brightness held out triggers the warning; towards bright ones it does not."""
    dark = ["--model.reward", "WeightedSum", "--model.reward.rewards", '["Brightness"]']
    dark += ["--model.images_per_prompt", "4", "--data.batch_size", "6"]
    dark += ["--data.prompts", json.dumps([*PROMPTS, "rocket", "frog"])]  # fewer than 6 cannot be tested
    held_out = "--model.eval_rewards+=Brightness"
    plain = predict("plain", *dark, "--model.reward.weights", "[-1]", held_out, "--model.sampler", "Unguided")
    evaluation = ["--evaluation.baseline", str(plain), "--evaluation.features", tiny_clip]
    evaluation += ["--evaluation.distances", "[cmmd]", "--model.sampler.num_candidates", "8"]
    capsys.readouterr()
    run = predict("dark", *dark, "--model.reward.weights", "[-1]", held_out, *evaluation)
    output = capsys.readouterr()
    assert "svdd: warning: over-optimisation" in output.err
    assert "Brightness by -" in output.err
    found = summary_of(run)
    assert found["baseline"]["over_optimised"] == ["Brightness"]
    assert found["baseline"]["rewards"]["WeightedSum"]["ci95_low"] > 0
    assert found["diversity"]["vendi"] > 1
    assert found["distances"]["cmmd"] > 0
    assert found["path_kl_bound"]["mean"] > 0
    assert summary_of(plain)["path_kl_bound"]["mean"] == 0
    positive = predict("other", *dark, "--model.reward.weights", "[1]", held_out, "--model.sampler", "Unguided")
    capsys.readouterr()
    both = predict("bright", *dark, "--model.reward.weights", "[1]", held_out, "--evaluation.baseline", str(positive))
    assert "over-optimisation" not in capsys.readouterr().err
    assert summary_of(both)["baseline"]["over_optimised"] == []


@pytest.mark.slow
def test_two_rewards_rise_at_once_on_the_embedded_model(tmp_path):
    """The recipe of docs/reference/rewards.md in fewer steps; benchmarks/over_optimisation.md has all numbers."""
    words = ["predict", "--config", "configs/weighted_sum.yaml", "--trainer.accelerator", "cpu"]
    words += ["--model.diffusion.num_inference_steps", "12"]
    plain = ["--model.sampler", "Unguided", "--model.images_per_prompt", "4", "--output", str(tmp_path / "plain")]
    assert main([*words, *plain]) == 0
    words += [
        "--evaluation.baseline",
        str(tmp_path / "plain"),
        "--evaluation.unpaired",
        "true",
    ]  # four have other seeds
    assert main([*words, "--output", str(tmp_path / "both")]) == 0
    found = summary_of(tmp_path / "both")["baseline"]
    assert found["rewards"]["Compressibility"]["ci95_low"] > 0
    assert found["rewards"]["CLIPScore"]["ci95_low"] > 0
    assert found["over_optimised"] == []


@pytest.mark.slow
def test_one_of_two_processes_measures_for_both(predict, sd15, tmp_path, tiny_clip):
    """The evaluation uses no collective operation, because the other process may have exited."""
    plain = predict("plain", "--model.reward", "Brightness", "--model.sampler", "Unguided")
    words = ["--model.reward", "Brightness", "--evaluation.features", tiny_clip, "--evaluation.baseline", str(plain)]
    words += ["--evaluation.distances", "[cmmd,kid,fid]", "--evaluation.distance_features", "clip"]
    one = predict("one", *words)
    run_in_two(command(sd15, tmp_path / "two", *words), tmp_path / "log.txt")
    found, expected = summary_of(tmp_path / "two"), summary_of(one)
    for name in ("diversity", "distances", "baseline"):
        assert found[name].keys() == expected[name].keys()
    assert found["diversity"]["vendi"] == pytest.approx(expected["diversity"]["vendi"], rel=1e-3)
    assert found["distances"]["cmmd"] == pytest.approx(expected["distances"]["cmmd"], rel=1e-2)


def test_evaluation_settings_may_change_when_a_run_continues(predict, tiny_clip, capsys):
    run = predict("run", "--model.reward", "Brightness")
    before = summary_of(run)
    capsys.readouterr()
    predict("run", "--model.reward", "Brightness", "--evaluation.features", tiny_clip)
    after = summary_of(run)
    assert after.pop("diversity")["vendi"] > 1
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluation.features", "./emojis"], "CLIPScore: pretrained='./emojis' is not a folder"),
        (["--evaluation.reference", "pictures", "--evaluation.distances", "[fid]"], "pip install 'svdd[fid]'"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_sampling(
    predict, pictures, tmp_path, monkeypatch, capsys, arguments, message
):
    import torchmetrics.image.fid

    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.chdir(tmp_path)
    run = predict("run", "--model.reward", "Brightness", *arguments, code=2)
    assert message in capsys.readouterr().err
    assert not run.exists()
    assert main(["score", "--reward", "Brightness", "--images", str(pictures), *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Brightness" not in output.out


def test_images_are_evaluated_on_the_device_of_the_run(tmp_path, monkeypatch):
    """Evaluation uses the run's device although Lightning moves the model to the CPU at the end."""
    measured = []
    monkeypatch.setattr("svdd.commands.predict.find_pictures", lambda folder: ["picture"])
    monkeypatch.setattr("svdd.commands.predict.report", lambda loggers, found, folder: None)
    run = SimpleNamespace(
        writer=SimpleNamespace(folder=SimpleNamespace(path=tmp_path)),
        evaluation=SimpleNamespace(baseline=None, measure=lambda *given: measured.append(given) or {}),
        model=torch.nn.Linear(1, 1),
        trainer=SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")), loggers=[]),
    )
    PredictCLI._evaluate(run, {})
    assert measured == [(["picture"], torch.device("meta"))]


FID = ["--evaluation.features", "CLIP", "--evaluation.distance_features", "clip", "--evaluation.distances", "[{}]"]


@pytest.mark.parametrize("distance", ["fid", "kid"])
@pytest.mark.parametrize(("drawn", "reference"), [(1, 4), (4, 1)])
def test_a_distance_of_one_picture_is_refused_before_sampling(
    predict, pictures, tiny_clip, capsys, distance, drawn, reference
):
    for k in range(reference, 4):
        (pictures / f"{k}.png").unlink()
    words = [word.format(distance).replace("CLIP", tiny_clip) for word in FID]
    words += ["--evaluation.reference", str(pictures), "--model.reward", "Brightness", "--data.limit", str(drawn)]
    run = predict("run", *words, code=2)
    said = capsys.readouterr().err
    assert f"{distance} needs at least 2 images on each side, got {drawn} to be measured and {reference}" in said
    assert not run.exists()


def test_a_distance_of_too_few_drawn_pictures_is_left_out(pictures, tiny_clip):
    """As when most prompts have failed: the other measurements are kept."""
    found = find_pictures(pictures)
    evaluation = Evaluation(tiny_clip, None, str(pictures), ["fid", "cmmd"], "clip")
    distances = evaluation.measure(found[:1])["distances"]
    assert distances["fid"] is None
    assert distances["cmmd"] > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "summary.json").write_text("[1]"), "has no readable summary.json"),
        (lambda run: (run / "summary.json").write_bytes(b"\xff{"), "has no readable summary.json"),
        (lambda run: (run / "results.jsonl").write_text("[" * 100_000), "line 1 is damaged (not JSON)"),
        (lambda run: edit(run, lambda row: row.pop("prompt")), "line 1 is damaged (prompt is None, expected text)"),
        (lambda run: edit(run, lambda row: row.update(rewards=[1])), "line 1 is damaged (rewards is [1]"),
        (
            lambda run: edit(run, lambda row: row.update(prompt="other")),
            "share no prompt: 'red apple', 'blue car', 'panda', ... in one, 'other' in the other; draw the",
        ),
        (
            lambda run: edit(run, lambda row: row.update(seed=9)),
            "have other random seeds of 4 images: 'red apple', image",
        ),
        (lambda run: edit(run, lambda row: row.update(prompt_index=99)), "lacks 3 prompts of this run, 'red apple'"),
        (lambda run: record(run, pretrained="other"), "this run and plain have other model.diffusion.pretrained"),
        (lambda run: record(run, num_inference_steps=4), "num_inference_steps is 3 in this run and 4 in plain"),
        (lambda run: (run / "fingerprints.json").write_text('{"parts": {"diffusion.unet": "0"}}'), "other weights of"),
        (lambda run: edit(run, lambda row: row.update(rewards={"x": 1})), "measured x, not Brightness"),
    ],
)
def test_a_baseline_that_cannot_serve_is_refused_before_sampling(
    predict, tmp_path, monkeypatch, capsys, damage, message
):
    monkeypatch.chdir(tmp_path)
    damage(save_run(tmp_path / "plain", {"Brightness": 0.5}))
    run = predict("run", "--model.reward", "Brightness", "--evaluation.baseline", "plain", code=2)
    assert message in capsys.readouterr().err
    assert not (run / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "is not the summary of a run (AttributeError)"),
        ({"Brightness": 3}, "is not the summary of a run (TypeError)"),
        ({"Brightness": {"mean": 1.0, "std": None}}, "has mean 1.0 and standard deviation None of Brightness"),
    ],
)
def test_statistics_of_a_damaged_summary_are_refused(tmp_path, rewards, message):
    (tmp_path / "summary.json").write_text(json.dumps({"rewards": rewards}))
    with pytest.raises(UserError, match=re.escape(message)):
        ZScored(Brightness(), statistics=str(tmp_path))


def edit(run, change) -> None:
    """Changes the rows of a run in place."""
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(run, **settings) -> None:
    """Records settings of the diffusion model in a run."""
    write_config(run, "predict", {"model": {"diffusion": {"class_path": "StableDiffusion", "init_args": settings}}})


def save_run(run, rewards: dict[str, float], count: int = len(PROMPTS)):
    """Writes an unguided run of one uniform picture for each prompt."""
    (run / "images").mkdir(parents=True)
    rows = []
    for k, prompt in enumerate(PROMPTS[:count]):
        file = f"images/{k:06d}-00.png"
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(run / file)
        row = {"prompt_index": k, "image_index": 0, "num_images": 1, "prompt": prompt, "seed": k, "file": file}
        rows.append(
            row
            | {
                "rewards": {name: score + k for name, score in rewards.items()},
                "ledger": {"denoiser_rows": 5, "network_rows": 7.4},
            }
        )
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"sampler": "Unguided"}))
    return run


def test_one_prompt_has_no_standard_error(predict, pictures, tmp_path, capsys):
    """Neither command prints a NaN."""
    plain = save_run(tmp_path / "plain", {"Brightness": 0.5}, 1)
    words = ["--model.reward", "Brightness", "--data.limit", "1", "--evaluation.baseline", str(plain)]
    predict("run", *words)
    for k in range(1, 4):
        (pictures / f"{k}.png").unlink()
    assert main(["score", "--reward", "Brightness", "--images", str(pictures)]) == 0
    output = capsys.readouterr()
    assert "nan" not in (output.out + output.err).replace(str(tmp_path), "")
    assert "no standard error from one prompt" in output.out


def test_a_missing_baseline_is_refused_before_sampling(predict, tmp_path, capsys):
    run = predict("run", "--model.reward", "Brightness", "--evaluation.baseline", str(tmp_path / "absent"), code=2)
    assert "evaluation.baseline=" in capsys.readouterr().err
    assert not (run / "results.jsonl").exists()


def test_loggers_receive_numbers_and_images(predict, tmp_path, tiny_clip):
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path / "board")}}
    csv = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    words = ["--trainer.logger", json.dumps([logger, csv]), "--evaluation.features", tiny_clip]
    predict("run", "--model.reward", "Brightness", *words)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "board").rglob("version_0")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"Brightness/mean", "diversity/vendi"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == len(PROMPTS)
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    assert "diversity/vendi" in table.read_text().splitlines()[0]


def test_weights_and_biases_receives_numbers_and_images_with_prompts(sd15, tmp_path):
    words = ["--model.reward", "Brightness", "--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true"]
    words += ["--trainer.logger.save_dir", str(tmp_path / "board")]
    run = [sys.executable, "-m", "svdd", *command(sd15, tmp_path / "run", *words)]
    environment = {**os.environ, "WANDB_CONSOLE": "off", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "board").rglob("*.wandb")
    logged = record.read_bytes()
    for word in ("Brightness/mean", *PROMPTS):
        assert word.encode() in logged, word
    shown = list((tmp_path / "board").rglob("media/images/*.png"))
    drawn = list((tmp_path / "run" / "images").glob("*.png"))
    assert sorted(pixels(path) for path in shown) == sorted(pixels(path) for path in drawn)


def pixels(path):
    return Image.open(path).convert("RGB").tobytes()
