"""The paper's experiments, from the shipped files, with tiny models: both fits, then the study with every method."""

import itertools
import re
from pathlib import Path

import pytest

from svdd.__main__ import main

CONFIGS = Path(__file__).parent.parent / "configs" / "paper"
T, COUNT = 3, 20  # steps here; M and N of the configurations
ROWS = {
    "pretrained": T,
    "best-of-N": COUNT * T,
    "DPS": T,
    "SMC": COUNT * T,
    "SVDD-MC": T,
    "SVDD-PM": 1 + COUNT * (T - 1),
}
SMALL = {  # what a test cannot afford, and what takes its place
    r"num_inference_steps: 50": f"num_inference_steps: {T}",
    r"prompts: \[cat, .*\]": "prompts: [cat, dog]\n  limit: 1",
    r"images_per_prompt: 64": "images_per_prompt: 1",
    r"num_rollouts: 4096": "num_rollouts: 6",
    r"keep_every: 5": "keep_every: 1",
    r"max_epochs: \d+": "max_epochs: 1",
    r"channels: 64": "channels: 4",
    r"scale: \[0.03, 0.1, .*?\]": "scale: [0.1]",
    r"scale: \[1.0, 3.0, .*?\]": "scale: [1.0]",
}


@pytest.fixture
def small(sd15, tiny_clip, tiny_head, tmp_path, monkeypatch):
    """The shipped files, in the working directory, where they win over the shipped ones; every change is found."""
    head = f"{{class_path: Aesthetic, init_args: {{pretrained: {tiny_clip}, head: {tiny_head}}}}}"
    models = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
        "openai/clip-vit-large-patch14": tiny_clip,
        "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth": tiny_head,
        "reward: Aesthetic": f"reward: {head}",
    }
    changes = SMALL | {re.escape(name): str(folder) for name, folder in models.items()}
    texts = {path.name: path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.yaml")}
    assert all(any(re.search(old, text) for text in texts.values()) for old in changes)
    (tmp_path / "paper").mkdir()
    for name, text in texts.items():
        for old, new in changes.items():
            text = re.sub(old, new, text)
        (tmp_path / "paper" / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_the_paper_is_two_fits_and_a_study(small, read_rows):
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    for reward in ("compressibility", "aesthetic"):
        words = ["--config", f"paper/fit_{reward}", *here, "--output", f"runs/paper/value-{reward}"]
        assert main(["fit", "--config", "paper/sd15", *words]) == 0
    assert main(["study", "paper/study", "--trainer.accelerator", "cpu", "--output", "study"]) == 0
    for guide in ("compressibility", "aesthetic"):
        for method, rows in ROWS.items():
            (row,) = read_rows(Path("study") / "cells" / f"{guide}-{method}")
            assert row["prompt"] == "cat"
            assert row["ledger"]["denoiser_rows"] == rows
    table = Path("study/table.md").read_text(encoding="utf-8")
    assert all(statistic in table for statistic in ("median", "top 10 %", *ROWS))


def test_the_study_runs_on_the_embedded_model(tmp_path, monkeypatch, read_rows):
    """The shipped values take T = 25, so two prompts and M = N = 2 keep it short."""
    (tmp_path / "paper").mkdir()
    for path in CONFIGS.glob("*.yaml"):
        text = re.sub("(num_candidates|num_particles): 20", r"\1: 2", path.read_text(encoding="utf-8"))
        if path.name == "emoji.yaml":
            text, found = re.subn(r"  best-of-N: .*\n  DPS: .*\n  SMC: .*\n(?=(.|\n)*baseline)", "", text)
            assert found == 1
            text = re.sub(r"      DPS: .*\n", "", text)
        (tmp_path / "paper" / path.name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    small = ["--data.limit", "2", "--model.images_per_prompt", "1", "--trainer.accelerator", "cpu"]
    assert main(["study", "paper/emoji", *small, "--output", "study"]) == 0
    for guide, method in itertools.product(("JPEG_size", "CLIPScore"), ("pretrained", "SVDD-MC", "SVDD-PM")):
        found = read_rows(Path("study") / "cells" / f"{guide}-{method}")
        assert [row["prompt"] for row in found] == ["apple on a yellow background", "avocado on a blue background"]
        reads_x0 = method == "SVDD-PM" or (guide, method) == ("CLIPScore", "SVDD-MC")
        assert {row["ledger"]["denoiser_rows"] for row in found} == {49 if reads_x0 else 25}
