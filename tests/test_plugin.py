"""The example plug-in, copied, renamed, installed and used: no file of svdd is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"
RENAMES = {"svdd_warmth": "svdd_coolness", "svdd-warmth": "svdd-coolness", "warmth": "coolness", "Warmth": "Coolness"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages with the renamed example, and one that cannot be imported."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in EXAMPLE.rglob("*"):
        if path.suffix not in (".toml", ".py", ".md"):
            continue
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(EXAMPLE))
        for old, new in RENAMES.items():
            text, name = text.replace(old, new), name.replace(old, new)
        copy = source / "good" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    broken = source / "bad" / "svdd_broken"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('not today')\n")
    toml = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    for old in ("svdd_warmth", "svdd-warmth", "warmth"):
        toml = toml.replace(old, RENAMES[old].replace("coolness", "broken"))
    (broken.parent / "pyproject.toml").write_text(toml)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source / "good", broken.parent], check=True)
    return target


def svdd(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    paths = [str(site), str(EXAMPLE.parent.parent)]
    return subprocess.run(
        [sys.executable, "-m", "svdd", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "default::UserWarning"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_an_installed_plugin_is_listed_and_a_broken_one_is_skipped(site, tmp_path):
    run = svdd(site, tmp_path, "list", "reward")
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if "Coolness" in line]
    assert "Mean of red minus the mean of blue" in line
    assert line.endswith("[svdd_coolness]")
    assert "Compressibility" in run.stdout
    assert "plug-in 'broken' of svdd-broken was skipped: RuntimeError: not today" in run.stderr


@pytest.mark.slow
def test_a_plugins_reward_guides_by_its_bare_name(site, tmp_path):
    shown = svdd(site, tmp_path, "predict", "--model.reward.help", "Coolness")
    assert "Factor on the score." in shown.stdout
    run = svdd(
        site,
        tmp_path,
        *("predict", "--model.reward", "Coolness", "--model.reward.strength", "2"),
        *("--model.eval_rewards+=Brightness", "--model.diffusion.num_inference_steps", "2"),
        *("--model.sampler.num_candidates", "2", "--data.prompts", '["apple"]', "--output", "run"),
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["guide"] == "Coolness"
    assert -2 <= summary["rewards"]["Coolness"]["mean"] <= 2


@pytest.mark.slow
def test_the_examples_own_test_passes(site, tmp_path):
    source = EXAMPLE / "tests" / "test_warmth.py"
    text = source.read_text(encoding="utf-8")
    for old, new in RENAMES.items():
        text = text.replace(old, new)
    (tmp_path / "test_coolness.py").write_text(text)
    paths = [str(site), str(EXAMPLE.parent.parent)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_coolness.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout
