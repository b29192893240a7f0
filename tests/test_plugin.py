"""The example plug-in, copied, renamed, installed and used without a change to svdd."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from svdd.__main__ import main
from tests.test_docs import unpack

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin"
PIP = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
RENAMES = {"svdd_warmth": "svdd_coolness", "svdd-warmth": "svdd-coolness", "warmth": "coolness", "Warmth": "Coolness"}


def copy_example(target: Path) -> Path:
    """Copies the example under other names, as in its README."""
    for path in EXAMPLE.rglob("*"):
        if path.suffix not in (".toml", ".py", ".md"):
            continue
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(EXAMPLE))
        for old, new in RENAMES.items():
            text, name = text.replace(old, new), name.replace(old, new)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    return target


def make_package(folder: Path, name: str, code: str) -> Path:
    """Writes a plug-in with the example's pyproject.toml."""
    package = folder / f"svdd_{name}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    toml = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    for old in ("svdd_warmth", "svdd-warmth", "warmth"):
        toml = toml.replace(old, RENAMES[old].replace("coolness", name))
    (folder / "pyproject.toml").write_text(toml)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages: the renamed example, one of the other kinds, and a broken one."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    kinds = make_package(
        source / "kinds",
        "kinds",
        "from svdd_kinds.my_diffusion import Tints\n"
        "from svdd_kinds.my_samplers import SparseSVDD\n"
        "from svdd_kinds.my_values import Tempered\n",
    )
    unpack(ROOT / "docs" / "how_to" / "extending.md", pages := tmp_path_factory.mktemp("pages"))
    for name in ("my_diffusion.py", "my_samplers.py", "my_values.py"):
        (kinds / "svdd_kinds" / name).write_text((pages / name).read_text())
    broken = make_package(source / "bad", "broken", "raise RuntimeError('not today')\n")
    packages = [copy_example(source / "good"), kinds, broken]
    subprocess.run([sys.executable, *PIP, "--target", target, *packages], check=True)
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
def test_installed_plugins_are_listed_and_a_broken_one_is_skipped(site, tmp_path):
    run = svdd(site, tmp_path, "list")
    assert run.returncode == 0, run.stderr
    packages = {"Coolness": "svdd_coolness", **dict.fromkeys(("Tints", "SparseSVDD", "Tempered"), "svdd_kinds")}
    for name, package in packages.items():
        (line,) = [line for line in run.stdout.splitlines() if name in line]
        assert line.endswith(f"[{package}]")
        assert name != "Coolness" or "Mean of red minus the mean of blue" in line
    assert "Compressibility" in run.stdout
    assert "plug-in 'broken' of svdd-broken was skipped: RuntimeError: not today" in run.stderr


@pytest.mark.slow
def test_classes_of_plugins_work_by_their_bare_names(site, tmp_path):
    shown = svdd(site, tmp_path, "predict", "--model.reward.help", "Coolness")
    assert "Factor on the score." in shown.stdout
    run = svdd(
        site,
        tmp_path,
        *("predict", "--model.reward", "Coolness", "--model.reward.strength", "2", "--model.eval_rewards+=Brightness"),
        *("--model.diffusion", "Tints", "--model.diffusion.side", "16", "--model.diffusion.num_inference_steps", "5"),
        *("--model.value", "Tempered", "--model.value.power", "2"),
        *("--model.sampler", "SparseSVDD", "--model.sampler.num_candidates", "3", "--model.sampler.interval", "2"),
        *("--data.prompts", '["a red wall"]', "--output", "run"),
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["guide"], summary["sampler"]) == ("Coolness", "SparseSVDD")
    assert summary["denoiser_rows_per_image"] == 5 + 2 * 2
    assert -2 <= summary["rewards"]["Coolness"]["mean"] <= 2
    assert 0.2 < summary["rewards"]["Brightness"]["mean"] < 0.7


@pytest.mark.slow
def test_a_copy_of_the_example_is_installed_editable(tmp_path):
    """After `pip install -e` into a separate environment with access to this one's packages, an edit takes effect.

    With the folders listed in pyproject.toml, hatchling does not need `editables`, which pip would download.
    """
    copy = copy_example(tmp_path / "copy")
    with open(copy / "pyproject.toml", "a") as toml:
        toml.write('\n[tool.hatch.build]\ndev-mode-dirs = ["."]\n')
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    (Path(paths["purelib"]) / "outer.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    subprocess.run([python, *PIP, "--editable", copy], check=True)

    source = copy / "svdd_coolness" / "__init__.py"
    source.write_text(source.read_text().replace("Mean of red minus the mean of blue", "Red without blue"))
    command = [python, "-m", "svdd", "list", "reward"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    (line,) = [line for line in run.stdout.splitlines() if "Coolness" in line]
    assert "Red without blue" in line


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
    assert "3 passed" in run.stdout


@pytest.mark.parametrize("call", ["sys.exit(0)", "exit()", "sys.exit('done')"])
def test_an_exit_while_a_plugin_is_imported_is_an_error(call, tmp_path, monkeypatch, capsys):
    (tmp_path / "quitter.py").write_text(f"import sys\n\n{call}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["predict", "--model.reward", "quitter.Reward", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"svdd: error: {tmp_path}/quitter.py:3 called sys.exit(" in error
    assert not (tmp_path / "run").exists()
