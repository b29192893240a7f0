"""docs/reference/run_folder.md lists the files and keys that real runs of every command write, no more and no fewer."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from svdd.__main__ import main

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "run_folder.md"
SOURCE = {"colour", "reference"}  # columns of the prompts, which are no keys of ours
_MEASURED = "--evaluation.baseline plain --evaluation.features emoji --evaluation.distances [cmmd]"
_FRAGILE = "--model.reward run_folder_rewards.fragile --model.on_error skip"
REWARDS = '''
"""Rewards of the test."""

__all__ = ["darkness", "fragile"]


def darkness(images):
    return images.mean((1, 2, 3))


def fragile(images, prompts):
    if "panda" in prompts:
        raise RuntimeError("no pandas")
    return images[:, 0].mean((1, 2))
'''


def listed() -> dict[str, set[str]]:
    """Returns the names in the first column of each section's tables, by the section's heading."""
    found: dict[str, set[str]] = {}
    for heading, section in re.findall(r"^##+ (.+)\n((?:(?!##+ ).*\n?)*)", PAGE.read_text(encoding="utf-8"), re.M):
        cells = re.findall(r"^\|([^|]+)\|", section, re.M)
        found[heading] = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return found


def files(folder: Path) -> set[str]:
    """Returns the files of a folder as the page lists them: the folder of images, runs and logs."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"^(images|cells|logs)/(?!version).*", r"\1/", name) for name in found}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(sd15, tmp_path_factory):
    """A folder with runs of all commands, by every option that adds a file or a key."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        (folder / "run_folder_rewards.py").write_text(REWARDS)
        Image.new("RGB", (64, 64), "red").save(folder / "apple.png")
        (folder / "prompts.csv").write_text(
            "prompt,negative_prompt,colour,reference\napple,blue,red,apple.png\npanda,red,black,apple.png\n"
        )
        short = ["--trainer.accelerator", "cpu", "--model.diffusion.num_inference_steps", "3"]
        short += ["--data.prompts", "prompts.csv", "--model.reward", "Compressibility"]
        plain = [*short, "--model.diffusion.pretrained", sd15]
        fit = [*plain, "--data.num_rollouts", "8", "--trainer.max_epochs", "1"]
        dark = "FunctionReward(run_folder_rewards.darkness, higher_is_better=False)"
        held_out = [*plain, f'--model.eval_rewards=["Similarity(clip)", "{dark}"]']
        (folder / "study.yaml").write_text("base: quickstart\nvariants: {a: {model.sampler: Unguided}}\n")
        for code, settings, line in (
            (0, plain, "predict --output plain --model.sampler Unguided"),
            (0, held_out, f"predict --output smc --model.sampler SMC --model.budget 9 {_MEASURED}"),
            (3, plain, f"predict --output all --model.sampler SMC --model.sampler.returns all --tar {_FRAGILE}"),
            (0, plain, "calibrate --output calibration --model.images_per_prompt 8 --model.candidates 3"),
            (0, fit, "fit --output fit --data.cache cache"),
            (0, [], "score --reward Compressibility --images plain --output score"),
            (0, short, "study study.yaml --output study"),
        ):
            command, *words = shlex.split(line)
            given = [*words, *settings] if command == "study" else [*settings, *words]
            assert main_code([command, *given]) == code, line
    return folder


def main_code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(str(end.code))


def test_files_of_a_run_are_those_of_the_page(runs):
    page = listed()
    predict = files(runs / "plain") | files(runs / "smc") | files(runs / "all")
    assert predict == page["svdd predict"]
    for command, folder in (("fit", "fit"), ("calibrate", "calibration"), ("score", "score"), ("study", "study")):
        assert files(runs / folder) == page[f"svdd {command}"], command


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("results.jsonl", ["plain/results.jsonl", "smc/results.jsonl", "all/results.jsonl"]),
        ("trace.jsonl", ["smc/trace.jsonl", "all/trace.jsonl"]),
        ("failed.jsonl", ["all/failed.jsonl"]),
        ("scores.jsonl", ["score/scores.jsonl"]),
    ],
)
def test_keys_of_lines_are_those_of_the_page(runs, name, paths):
    written = {key for path in paths for row in lines(runs / path) for key in row} - SOURCE
    assert written == listed()[name]


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("summary.json", ["plain/summary.json", "smc/summary.json", "all/summary.json"]),
        ("fingerprints.json", ["plain/fingerprints.json", "smc/fingerprints.json"]),
        ("calibration.json", ["calibration/calibration.json"]),
    ],
)
def test_keys_of_objects_are_those_of_the_page(runs, name, paths):
    assert {key for path in paths for key in json.loads((runs / path).read_text())} == listed()[name]


def test_columns_of_a_study_are_those_of_the_page(runs):
    with open(runs / "study" / "study.csv", newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert {re.sub(r"^reward\..*", "reward.NAME", name) for name in header} == listed()["study.csv"]
