"""The wheel: its contents, and its configurations by name in any directory."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from svdd import UserError
from svdd.commands.parser import with_shipped_configs
from tools.oldest import constraints

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_code_types_models_configs_and_licences(wheel):
    (metadata,) = wheel.glob("svdd-*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"svdd", metadata.name}
    files = {str(path.relative_to(wheel / "svdd")) for path in (wheel / "svdd").rglob("*") if path.is_file()}
    assert {"py.typed", "samplers/__init__.pyi", "assets/emoji_prompts.txt", "assets/LICENSES.md"} <= files
    assert {f"assets/configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml")} <= files
    assert {Path(file).suffix for file in files} == {
        ".py",
        ".pyi",
        ".typed",
        ".safetensors",
        ".json",
        ".md",
        ".txt",
        ".yaml",
        ".html",
        ".css",
        ".js",
    }
    assert (metadata / "licenses" / "svdd" / "assets" / "LICENSES.md").is_file()
    fields = (metadata / "METADATA").read_text(encoding="utf-8")
    for field in (
        "Author: svdd developers",
        "Project-URL: Paper",
        "Classifier: Typing :: Typed",
        "License-Expression:",
    ):
        assert field in fields


@pytest.mark.slow
def test_shipped_configs_and_prompts_work_by_name_in_any_directory(wheel, tmp_path, read_rows):
    small = ["--model.diffusion.num_inference_steps", "2", "--model.sampler.num_candidates", "2", "--data.limit", "1"]
    words = ["predict", "--config", "quickstart", "--data.prompts", "emoji", *small, "--output", "run"]
    run = subprocess.run(
        [sys.executable, "-m", "svdd", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (row,) = read_rows(tmp_path / "run")
    prompts = (ROOT / "svdd" / "assets" / "emoji_prompts.txt").read_text(encoding="utf-8")
    assert row["prompt"] == prompts.splitlines()[0]
    assert set(json.loads((tmp_path / "run" / "summary.json").read_text())["rewards"]) == set(row["rewards"])


def test_names_of_shipped_configs_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(CONFIGS / "smc.yaml")
    for words in (["--config", "smc"], ["-c", "smc.yaml"]):
        assert with_shipped_configs(["predict", *words, "--output", "smc"])[2:] == [shipped, "--output", "smc"]
    assert with_shipped_configs(["--config=smc"]) == [f"--config={shipped}"]
    assert with_shipped_configs(["-c", "paper/smc"]) == ["-c", str(CONFIGS / "paper" / "smc.yaml")]
    for other in ("runs/smc.yaml", "./smc.yaml", "{model: {seed: 1}}", ""):
        assert with_shipped_configs(["--config", other]) == ["--config", other]
    assert with_shipped_configs(["predict", "--config"]) == ["predict", "--config"]


def test_a_config_in_the_working_directory_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smc.yaml").write_text("model: {}\n")
    assert with_shipped_configs(["--config", "smc"]) == ["--config", "smc.yaml"]
    assert with_shipped_configs(["--config", "smc.yaml"]) == ["--config", "smc.yaml"]


def test_an_unknown_config_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "variants" not in yaml.safe_load(path.read_text())]
    known = ", ".join(str(path.relative_to(CONFIGS).with_suffix("")) for path in paths)  # without studies
    for wrong, right in (("quikstart", "quickstart"), ("paper/compresibility", "paper/compressibility")):
        message = f"--config {wrong}: no such file or shipped configuration; known: {known}; did you mean '{right}'?"
        with pytest.raises(UserError, match=re.escape(message)):
            with_shipped_configs(["predict", "--config", wrong])


def test_constraints_are_the_lower_bounds():
    project = {
        "dependencies": ["torch>=2.6.0", "jsonargparse[signatures]>=4.51.0,<4.54", "tqdm"],
        "optional-dependencies": {"lora": ["peft>=0.18.0"], "dev": ["svdd[lora]", "types-tqdm"]},
    }
    assert constraints(project) == ["torch==2.6.0", "jsonargparse==4.51.0", "peft==0.18.0"]
