"""The command line: complete runs on tiny models, and error messages."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from svdd.__main__ import main
from svdd.commands.parser import Parser
from tests.faults.harness import run_in_two

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def config(sd15, prompts_file, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "reward": "Compressibility",
                    "diffusion": {
                        "class_path": "StableDiffusion",
                        "init_args": {"pretrained": sd15, "num_inference_steps": 3},
                    },
                    "sampler": {"class_path": "SVDD", "init_args": {"num_candidates": 2}},
                },
                "data": {"prompts": str(prompts_file)},
                "trainer": {"accelerator": "cpu", "devices": 1},
            }
        )
    )
    return path


@pytest.fixture
def predict(config, tmp_path):
    def run(*arguments: str) -> int:
        return main(["predict", "--config", str(config), "--output", str(tmp_path / "run"), *arguments])

    return run


@pytest.fixture
def refused(predict, capsys, tmp_path):
    """Runs a command, asserts exit code 2, one line and no output folder, and returns the line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert predict(*arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("svdd: error: ")
        assert not list(tmp_path.glob("run/images/*"))
        assert not (tmp_path / "run" / "results.jsonl").exists()
        return lines[0]

    return run


def test_a_run_writes_all_documented_files(predict, tmp_path, read_rows):
    assert predict("--model.eval_rewards+=Incompressibility", "--model.images_per_prompt", "2") == 0
    run = tmp_path / "run"
    rows = read_rows(run)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, k) for p in range(3) for k in range(2)]
    assert [row["seed"] for row in rows] == list(range(6))
    for row in rows:
        assert row["ledger"]["denoiser_rows"] == 1 + 2 * (3 - 1)
        assert row["ledger"]["network_rows"] == 2 * row["ledger"]["denoiser_rows"]
        assert set(row["rewards"]) == {"Compressibility", "Incompressibility"}
        picture = Image.open(run / row["file"])
        assert picture.info["prompt"] == row["prompt"]
        kilobytes = row["rewards"]["Incompressibility"]
        assert row["rewards"]["Compressibility"] == -kilobytes
    summary = json.loads((run / "summary.json").read_text())
    scores = [row["rewards"]["Compressibility"] for row in rows]
    assert summary["rewards"]["Compressibility"]["mean"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert summary["ledger"]["denoiser_rows"] == sum(row["ledger"]["denoiser_rows"] for row in rows)
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["model"]["sampler"]["init_args"] == {
        "num_candidates": 2,
        "alpha": 0.0,
        "num_particles": 1,
        "score_parent": False,
        "choose_start": False,
        "guide_start": 0.0,
        "guide_stop": 1.0,
        "guide_every": 1,
    }


@pytest.mark.parametrize("sampler", [["Unguided"], ["SVDD", "--model.sampler.num_candidates", "1"]])
def test_pngs_equal_those_of_the_pipeline(predict, tmp_path, sd15, prompts_file, sampler):
    options = ["--data.batch_size", "3", "--model.seed", "40", "--model.diffusion.parity", "true"]
    assert predict("--model.sampler", *sampler, *options) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (40, 41, 42)]
    prompts = prompts_file.read_text().splitlines()
    images = pipeline(prompts, num_inference_steps=3, guidance_scale=7.5, eta=1.0, generator=generators).images
    for index, image in enumerate(images):
        ours = Image.open(tmp_path / "run" / "images" / f"{index:06d}-00.png")
        assert np.array_equal(np.asarray(ours), np.asarray(image))


def test_a_run_continues_where_it_stopped(predict, tmp_path, read_rows):
    assert predict("--data.batch_size", "1") == 0
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.glob("images/*.png")}
    rows, summary = read_rows(run), json.loads((run / "summary.json").read_text())
    (run / "images" / "000001-00.png").write_bytes(b"torn")
    stamp = (run / "images" / "000000-00.png").stat().st_mtime_ns
    assert predict("--data.batch_size", "1") == 0
    assert {path.name: path.read_bytes() for path in run.glob("images/*.png")} == before
    assert (run / "images" / "000000-00.png").stat().st_mtime_ns == stamp
    without_times = [{**row, "ledger": row["ledger"]["denoiser_rows"]} for row in rows]
    assert [{**row, "ledger": row["ledger"]["denoiser_rows"]} for row in read_rows(run)] == without_times
    assert json.loads((run / "summary.json").read_text())["rewards"] == summary["rewards"]


def test_a_finished_run_is_left_alone(predict, tmp_path):
    assert predict() == 0
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    assert predict() == 0
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary


def test_a_folder_of_another_configuration_is_refused_unless_overwritten(predict, capsys, tmp_path):
    assert predict() == 0
    results = (tmp_path / "run" / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert predict("--model.sampler.num_candidates", "3") == 2
    message = capsys.readouterr().err
    assert "model.sampler.num_candidates was 2, now 3" in message
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == results
    assert predict("--model.sampler.num_candidates", "3", "--overwrite", "true") == 0
    assert (tmp_path / "run" / "results.jsonl").read_bytes() != results


def test_an_edited_prompt_file_is_another_run(predict, capsys, prompts_file):
    assert predict() == 0
    prompts_file.write_text("red apple\ngreen car\npanda\n")
    assert predict() == 2
    expected = "1 of the first 3 prompts differ (prompt 1: was 'blue car on a white background', now 'green car')"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model.sampler", "SVD"],
            "known: BeamSearch, BestOfN, BlockwiseBestOfN, CrossEntropySearch, DPS, EvolutionarySearch, "
            "NoiseOptimisation, ProgressivePruning, RandomSearch, Refinement, RolloverBudget, SMC, SVDD, TwistedSMC, "
            "Unguided, ZeroOrderSearch; did you mean 'SVDD'?",
        ),
        (["--model.value", "PosteriorMeen"], "unknown value 'PosteriorMeen'; known: FeatureValue, LatentConvValue, "),
        (["--model.reward", "Compresibility"], "did you mean 'Compressibility'?"),
        (["--model.eval_rewards+=Nope"], "unknown reward 'Nope'"),
        (["--model.reward", "my_module.Mine"], "No module named 'my_module'"),
        (
            ["--model.sampler", "SVDD", "--model.sampler.candidates", "3"],
            "no argument 'candidates'; `svdd predict --model.sampler.help NAME` lists what class NAME takes",
        ),
        (["--model.sampler.num_candidates", "many"], "expected int, list or dict, got many"),
        (["--model.sampler.num_candidates", "0"], "num_candidates must be >= 1, got 0"),
        (["--model.sampler.alpha", "cool"], "alpha: expected float or one of auto, got cool"),
        (["--model.sampler.alpha", "-1"], "alpha must be >= 0 or auto, got -1.0"),
        (["--model.diffusion.num_inference_steps", "0"], "num_inference_steps must be an integer >= 1, got 0"),
        (["--model.diffusion.eta", "0"], "eta=0 every step is deterministic"),
        (["--model.diffusion.scheduler", "pndm"], "known: ddim, ddpm, euler, euler_ancestral"),
        (["--model.diffusion.chunk_size", "0"], "chunk_size must be 'auto' or an integer >= 1, got 0"),
        (["--model.diffusion.pretrained", "/no/such/folder"], "'/no/such/folder' is not a folder"),
        (["--model.sampler.guide_every", "0"], "guide_every must be >= 1, got 0"),
        (["--model.sampler", "SMC", "--model.sampler.alpha", "0"], "alpha must be > 0 or auto, got 0.0"),
        (
            ["--model.sampler", "SMC", "--model.sampler.resampler", "best"],
            "resampler: expected one of multinomial, stratified, systematic, residual, ssp, got best",
        ),
        (["--model.sampler", "DPS"], "DPS needs gradients, and reward Compressibility is not differentiable"),
        (["--model.budget", "2"], "budget=2 is too small: SVDD with num_candidates=1 costs 3 denoiser rows"),
        (["--model.budget", "0"], "budget must be an integer >= 1, in denoiser rows per image, got 0"),
        (["--model.images_per_prompt", "0"], "images_per_prompt must be >= 1, got 0"),
        (["--data.batch_size", "0"], "batch_size must be >= 1, got 0"),
        (["--data.prompts", "/no/such/prompts.txt"], "no such file"),
        (["--modell.seed", "3"], "unrecognized arguments: --modell.seed"),
        (["--config", "/no/such.yaml"], "File does not exist: '/no/such.yaml'"),
        (["--trainer.limit_predict_batches", "0"], "must be a whole number of batches >= 1, got 0"),
        (["--trainer.limit_predict_batches", "0.5"], "must be a whole number of batches >= 1, got 0.5"),
        (["--trainer.strategy", "ddp_spawn"], "'ddp_spawn' starts processes that do not know this command"),
        (["--data.batch_size", "1" + "0" * 30], "data.batch_size: expected an integer below 2**63, got 1.000e+30"),
        (["--model.budget", "1e30"], "model.budget: expected int"),
        (["--model.sampler.alpha", "1e-320"], "alpha: expected 0 or a magnitude from 1e-30 to 1e+30"),
        (["--model.sampler.guide_stop", ".nan"], "guide_stop: expected a number, got nan"),
        (["--data.prompts", "a\0b.txt"], "character 2 is '\\x00', which cannot be stored"),
        (["--output", "x" * 5000], "File name too long"),
        (["--model.reward", "\x1b[2J\u202eNope"], r"\x1b[2J\u202eNope"),
        (["--model.reward", "&a [*a]"], "YAML alias *a stands within the part that it names"),
    ],
)
def test_a_bad_setting_is_one_line_and_code_2(refused, arguments, expected):
    assert expected in refused(*arguments)


_BOMB = "[&a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
) + "]"  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"trainer: 5\n", "trainer: expected settings as a mapping, got 5"),
        (b"data: []\n", "data: expected settings as a mapping, got []"),
        (b"- model\n", "expected settings as a mapping, such as `model:`, got ['model']"),
        (b"model: {seed: 3\n", "cannot be read as YAML"),
        (b"# caf\xe9\nmodel: {}\n", "bad.yaml is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 5"),
        (b"model: " + b"{a: " * 2000 + b"1" + b"}" * 2000, "YAML nests deeper than 64 levels"),
        (b"model: " + b"[" * 100_000, "cannot be read as YAML"),
        (f"model: {_BOMB}".encode(), "YAML aliases stand for more than 10000 entries"),
        (f"model: {{reward: '{_BOMB}'}}".encode(), "YAML aliases stand for more than 10000 entries"),
        (b"model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (b'output: "a\\0b"\n', "output: character 2 is '\\x00'"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(refused, tmp_path, content, expected):
    """Alias bombs and deep nesting are refused before they are built."""
    (tmp_path / "bad.yaml").write_bytes(content)
    arguments = ["--config", str(tmp_path / "bad.yaml")]
    assert expected in (line := refused(*arguments)) or content.startswith(b"output")
    assert "bad.yaml" in line or "reward" in line or "output" in line


def test_the_configuration_that_a_run_recorded_is_a_configuration(predict, tmp_path, read_rows, monkeypatch):
    """Its checksums are left out, and so is `overwrite`, which would remove the run."""
    value = ["--model.value", "LatentConvValue", "--model.value.pretrained", "emoji-compressibility"]
    emoji = ["--model.diffusion.pretrained", "emoji", "--model.diffusion.num_inference_steps", "25"]
    emoji += ["--model.diffusion.guidance_scale", "3", "--data.limit", "1", "--model.sampler.guide_stop", "0.96"]
    assert predict(*emoji, *value, "--overwrite", "true") == 0
    config, rows = str(tmp_path / "run" / "config.yaml"), read_rows(tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()}
    assert main(["predict", "--config", config, "--output", str(tmp_path / "again")]) == 0
    assert [row["sha256"] for row in read_rows(tmp_path / "again")] == [row["sha256"] for row in rows]
    assert main(["predict", f"--config={config}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()} == stamps


def test_a_progress_bar_of_the_user_takes_the_place_of_ours(predict):
    assert predict("--trainer.callbacks+=TQDMProgressBar") == 0


@pytest.mark.parametrize("command", ["predict", "fit", "calibrate"])
def test_the_help_begins_with_a_whole_sentence(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: svdd {command} [--config FILE]")
    assert text.splitlines()[2].endswith(".")
    assert "Useful to" not in text


def test_the_working_directory_is_searched_last(tmp_path):
    for name in ("csv.py", "difflib.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('from the working directory')")
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("raise SystemExit('from the working directory')")
    code = "import sys; sys.path.remove(''); from svdd.__main__ import main; main(['lst']); import diffusers"
    for start in (["-m", "svdd", "lst"], ["-c", code]):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, *start], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert "did you mean 'list'?" in done.stderr
        assert "from the working directory" not in done.stderr


def test_an_interrupt_during_the_first_import_leaves_no_traceback(tmp_path):
    (tmp_path / "lazy_loader.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    command = [sys.executable, "-m", "svdd", "list"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_mistake_in_a_custom_sampler_names_class_and_method(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrong_samplers.py").write_text(
        "import torch\n"
        "from svdd.samplers.base import Sampler\n"
        "class Forgetful(Sampler):\n"
        "    def __init__(self, interval: int = 2) -> None: ...\n"
        "class Early(Sampler):\n"
        "    def sample(self, start, value):\n"
        "        return start().propose()\n"
        "class Global(Sampler):\n"
        "    def sample(self, start, value):\n"
        "        state = start()\n"
        "        while not state.done:\n"
        "            state = state.propose(mean=state.prediction.mean + torch.randn(()))\n"
        "        return state\n"
    )
    for arguments, expected in (
        (["Forgetful"], "class 'wrong_samplers.Forgetful' cannot be used: Forgetful does not implement Sampler.sample"),
        (["Forgetful", "--model.sampler.interval", "3"], "Forgetful does not implement Sampler.sample"),
        (["Early"], "Early.sample returned a state at step 1 of 3"),
        (["Global"], "Global.sample draws from a global random generator"),
    ):
        assert expected in refused("--model.sampler", f"wrong_samplers.{arguments[0]}", *arguments[1:])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n  \n\n", "3 blank"),
        ("latin.txt", "caf\u00e9\n".encode("latin-1"), "line 1"),
        ("torn.jsonl", b'{"prompt": "apple"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("columns.csv", b"promt,seed\napple,1\n", "promt"),
        ("broken.json", b'["apple", ', "not valid JSON"),
    ],
)
def test_a_bad_prompt_file_is_named_in_the_error(refused, tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    line = refused("--data.prompts", str(path))
    assert name in line
    assert expected in line


def test_blank_lines_are_skipped_with_a_message(predict, tmp_path, prompts_file, read_rows):
    prompts_file.write_text("apple\n\n\npanda\n")
    with pytest.warns(UserWarning, match="skipped 2 blank prompts, the first at line 2"):
        assert predict() == 0
    assert [row["prompt"] for row in read_rows(tmp_path / "run")] == ["apple", "panda"]


def test_a_folder_without_a_pipeline(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused("--model.diffusion.pretrained", str(tmp_path / "empty"))


def test_an_output_that_is_a_file(predict, capsys, tmp_path, config):
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["predict", "--config", str(config), "--output", str(path)]) == 2
    assert "svdd: error: " in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_an_unrelated_folder_is_not_overwritten(predict, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert predict("--overwrite", "true") == 2
    assert "run folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


REWARDS = """
import torch
from svdd.rewards.base import Reward
from svdd.rewards.pretrained import PretrainedReward

class Redness(Reward):
    '''Mean of the red channel.'''
    def forward(self, images, prompts):
        return images[:, 0].mean((1, 2))

class WrongShape(Reward):
    '''Not one number per image.'''
    def forward(self, images, prompts):
        return images.mean()

class Broken(Reward):
    '''Fails.'''
    def forward(self, images, prompts):
        raise RuntimeError("red\\x1b[2J")

class Unread(PretrainedReward):
    '''Fails when it reads its weights.'''
    def read(self):
        return self.no_such_attribute
    def forward(self, images, prompts):
        return self.network(images)

class NotANumber(Reward):
    '''NaN for one prompt.'''
    def forward(self, images, prompts):
        return torch.tensor([float("nan") if p == "panda" else 0.0 for p in prompts])
"""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def test_a_custom_reward_in_the_working_directory(predict, own_rewards, tmp_path, read_rows):
    assert predict("--model.reward", "own_rewards.Redness") == 0
    for row in read_rows(tmp_path / "run"):
        red = np.asarray(Image.open(tmp_path / "run" / row["file"]))[..., 0].mean() / 255
        assert row["rewards"]["Redness"] == pytest.approx(red, abs=2e-3)


def test_a_bad_reward_ends_the_run_in_one_line_and_keeps_what_is_done(predict, own_rewards, capsys, tmp_path):
    assert predict("--model.reward", "own_rewards.WrongShape") == 2
    assert "reward WrongShape returned shape []" in capsys.readouterr().err
    assert predict("--model.reward", "own_rewards.NotANumber", "--data.batch_size", "1") == 2
    message = capsys.readouterr().err
    assert "NaN" in message
    assert "'panda'" in message
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir()) == ["000000-00.png", "000001-00.png"]


def test_an_error_in_a_users_code_shows_its_place_and_one_in_a_library_does_not(predict, own_rewards, capsys, tmp_path):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "theirs.py").write_text((tmp_path / "own_rewards.py").read_text())
    sys.path.append(str(packages))
    assert predict("--model.reward", "own_rewards.Broken") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "own_rewards.py" in lines[1]
    assert lines[-1] == r"svdd: error: reward Broken failed with RuntimeError: red\x1b[2J"
    assert predict("--model.reward", "own_rewards.Unread") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "own_rewards.py" in lines[1]
    assert "Unread.read failed with AttributeError: 'Unread' object has no attribute 'no_such_attribute'" in lines[-1]
    assert predict("--model.reward", "theirs.Broken") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    sys.path.remove(str(packages))
    sys.modules.pop("theirs")


def test_a_warning_is_one_line_without_control_characters(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored at the end
    assert main(["list", "reward"]) == 0
    shown = warnings.formatwarning("a\nb\x1b[2J\u202e", UserWarning, sys.modules["svdd"].__file__, 1)
    assert shown == "svdd: warning: a b\\x1b[2J\\u202e\n"


def test_an_error_in_svdd_is_one_line_and_code_1(predict, capsys, monkeypatch):
    """A class of a library that is no reward raises what nothing in svdd expects."""
    words = ["--trainer.callbacks+=lightning.pytorch.callbacks.LambdaCallback", "--trainer.callbacks.on_predict_start"]
    assert predict(*words, "collections.deque.popleft") == 1
    line = capsys.readouterr().err.strip()
    assert line.endswith("(SVDD_DEBUG=1 shows where)")
    assert "\n" not in line
    monkeypatch.setenv("SVDD_DEBUG", "1")
    with pytest.raises(TypeError):
        predict(*words, "collections.deque.popleft")


def test_a_budget_is_met_and_reported(predict, capsys, tmp_path, read_rows):
    assert predict("--model.budget", "20") == 0
    assert "budget 20: SVDD with num_candidates=9, denoiser_rows=19 per image" in capsys.readouterr().out
    assert {row["ledger"]["denoiser_rows"] for row in read_rows(tmp_path / "run")} == {19}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["budget"] == {"denoiser_rows": 20, "chosen": {"num_candidates": 9, "denoiser_rows": 19}}


def test_particles_write_weights_and_lineage(predict, tmp_path, read_rows):
    sampler = ["--model.sampler", "SMC", "--model.sampler.num_particles", "3", "--model.sampler.returns", "all"]
    assert predict(*sampler, "--model.sampler.tempering", "linear", "--data.batch_size", "1") == 0
    run = tmp_path / "run"
    rows = read_rows(run)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, j) for p in range(3) for j in range(3)]
    assert len(list(run.glob("images/*.png"))) == 9
    traces = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    assert [(trace["prompt_index"], trace["image_index"]) for trace in traces] == [(p, 0) for p in range(3)]
    for trace in traces:
        assert trace["step"] == [1, 2, 3]
        assert [len(kept) for kept in trace["lineage"]] == [3, 3, 3]
        assert len(set(trace["alpha"])) == 1
    before, summary = (run / "trace.jsonl").read_bytes(), json.loads((run / "summary.json").read_text())
    assert summary["choices"] == 3
    assert 0 < summary["ess"] < 1
    (run / "images" / "000001-02.png").unlink()  # one of three ends: the prompt is redone, with its trace
    assert predict(*sampler, "--model.sampler.tempering", "linear", "--data.batch_size", "1") == 0
    assert [row["sha256"] for row in read_rows(run)] == [row["sha256"] for row in rows]
    assert len((run / "trace.jsonl").read_bytes().splitlines()) == len(before.splitlines())
    resumed = json.loads((run / "summary.json").read_text())
    assert all(resumed[name] == summary[name] for name in ("choices", "resamplings", "spread", "ess", "alpha"))


@pytest.mark.parametrize("sampler", [["DPS"], ["TwistedSMC", "--model.sampler.alpha", "0.1"]], ids=lambda case: case[0])
def test_gradients_flow_on_the_command_line(predict, tiny_clip, tmp_path, read_rows, sampler):
    reward = ["--model.reward", "CLIPScore", "--model.reward.pretrained", tiny_clip]
    assert predict(*reward, "--model.sampler", *sampler) == 0
    for row in read_rows(tmp_path / "run"):
        assert row["ledger"]["gradient_rows"] == row["ledger"]["denoiser_rows"] > 0


def test_another_class_starts_from_its_own_defaults(predict, tmp_path):
    """SVDD's `num_particles: 1` and `alpha: 0.0` are not passed on to SMC."""
    assert predict("--model.sampler", "SMC", "--model.sampler.potential", "max") == 0
    arguments = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["sampler"]["init_args"]
    assert (arguments["num_particles"], arguments["alpha"], arguments["potential"]) == (8, "auto", "max")
    assert "num_candidates" not in arguments


def test_the_same_class_keeps_the_settings_of_the_config(predict, tmp_path, capsys):
    assert predict("--model.sampler", "SVDD", "--model.sampler.alpha", "500") == 0
    assert "warning: SVDD chose almost at random: alpha=500 is large against" in capsys.readouterr().err
    arguments = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["sampler"]["init_args"]
    assert (arguments["num_candidates"], arguments["alpha"]) == (2, 500)


@pytest.fixture
def fit(config, tmp_path):
    def run(*arguments: str) -> int:
        settings = ["--data.num_rollouts", "12", "--data.batch_size", "8", "--data.cache", str(tmp_path / "cache")]
        short = ["--trainer.max_epochs", "2", "--output", str(tmp_path / "value")]
        return main(["fit", "--config", str(fit_config(config)), *settings, *short, *arguments])

    return run


def fit_config(config: Path) -> Path:
    """The same model with a learned value and no sampler."""
    settings = yaml.safe_load(config.read_text())
    del settings["model"]["sampler"]
    settings["model"]["value"] = {"class_path": "LatentConvValue", "init_args": {"channels": 8, "num_blocks": 1}}
    path = config.with_name("fit.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_value_is_fitted_and_then_used(fit, predict, capsys, tmp_path, read_rows):
    assert fit() == 0
    assert "LatentConvValue for Compressibility" in capsys.readouterr().out
    checkpoint, weights = tmp_path / "value" / "checkpoints" / "best.ckpt", tmp_path / "value" / "value.safetensors"
    value = ["--model.value", "LatentConvValue"]
    assert predict("--ckpt_path", str(checkpoint)) == 0
    first = read_rows(tmp_path / "run")
    assert {row["ledger"]["denoiser_rows"] for row in first} == {3}  # T, with two candidates a step
    assert predict(*value, "--model.value.pretrained", str(weights), "--output", str(tmp_path / "again")) == 0
    assert len(read_rows(tmp_path / "again")) == len(first)
    capsys.readouterr()
    assert fit("--model.value.learning_rate", "0.01", "--overwrite", "true") == 0  # other weights in the same file
    assert predict(*value, "--model.value.pretrained", str(weights), "--output", str(tmp_path / "again")) == 2
    assert "was begun with other contents of value: restore" in capsys.readouterr().err
    assert predict(*value, "--overwrite", "true") == 2
    assert "LatentConvValue is not trained yet" in capsys.readouterr().err
    other = ["--ckpt_path", str(checkpoint), "--overwrite", "true", "--model.diffusion.num_inference_steps", "4"]
    assert predict(*other) == 2
    assert "was trained for something else: num_inference_steps was 3, here it is 4" in capsys.readouterr().err
    mismatch = ["--model.value", "FeatureValue", "--ckpt_path", str(checkpoint), "--overwrite", "true"]
    assert predict(*mismatch) == 2
    assert "value was 'LatentConvValue', here it is 'FeatureValue'" in capsys.readouterr().err
    assert predict("--ckpt_path", str(tmp_path / "none.ckpt"), "--overwrite", "true") == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "garbage.ckpt").write_text("no checkpoint")
    assert predict("--ckpt_path", str(tmp_path / "garbage.ckpt"), "--overwrite", "true") == 2
    assert "garbage.ckpt' is not a weights file, or a damaged one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.value", "LatentConvValue", "--model.value.pretrained", "none.safetensors"], "cannot be read"),
        (["--model.value", "svdd.values.load_value", "--model.value.pretrained", "none.ckpt"], "cannot be read"),
        (["--ckpt_path", "none.ckpt"], "cannot be read"),
        (
            ["--model.value", "Lookahead", "--ckpt_path", "emoji-compressibility"],
            "holds a LatentConvValue, but model.value is Lookahead, which has no weights: give",
        ),
    ],
)
def test_the_file_of_a_value_is_checked_before_the_run_folder_is_made(refused, tmp_path, arguments, expected):
    assert expected in refused(*arguments)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_fit_continues(fit, capsys, tmp_path):
    assert fit("--trainer.max_epochs", "1") == 0
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert fit("--trainer.max_epochs", "3") == 0
    last = torch.load(tmp_path / "value" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert last["global_step"] == 3 * 3  # 22 states in batches of 8, three epochs, none repeated
    assert len(list((tmp_path / "value" / "logs").iterdir())) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == cached
    capsys.readouterr()
    assert fit("--model.value.learning_rate", "0.1") == 2
    assert "model.value.learning_rate was 0.001, now 0.1" in capsys.readouterr().err
    assert fit("--model.value.learning_rate", "0.1", "--overwrite", "true") == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.value", "PosteriorMean"], "'PosteriorMean' cannot be used here: `svdd fit` trains a learned value"),
        (["--model.sampler", "SMC"], "unrecognized arguments: --model.sampler"),
        (
            ["--config", str(REPOSITORY / "configs" / "smc.yaml")],
            "`svdd fit` has no setting 'model.sampler', remove it",
        ),
        (["--data.num_rollouts", "0"], "num_rollouts must be >= 4"),
        (["--data.prompts", "/no/such.txt"], "no such file"),
        (["--model.value", "LatentConv"], "did you mean 'LatentConvValue'?"),
        (["--model.value.chanels", "3"], "`svdd fit --model.value.help NAME` lists what class NAME takes"),
        (["--model.value.loss", "svdd.values.losses.SoftLoss"], "alpha"),
    ],
)
def test_an_impossible_fit_is_one_line_and_code_2(fit, capsys, arguments, expected):
    assert fit(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert lines[-1].startswith("svdd: error: ")


def test_another_value_without_arguments_is_fitted(tiny_clip, tmp_path):
    """All arguments of the configuration's value are discarded, its loss included."""
    words = ["--model.diffusion.num_inference_steps", "3", "--data.num_rollouts", "6", "--data.batch_size", "8"]
    words += ["--data.cache", str(tmp_path / "cache"), "--trainer.max_epochs", "1", "--output", str(tmp_path / "value")]
    config = str(REPOSITORY / "configs" / "fit_value_compressibility.yaml")
    assert main(["fit", "--config", config, "--model.value", "FeatureValue", *words]) == 0
    value = yaml.safe_load((tmp_path / "value" / "config.yaml").read_text())["model"]["value"]
    assert value["class_path"].endswith("FeatureValue")
    assert (value["init_args"]["learning_rate"], value["init_args"]["loss"]) == (1e-3, None)
    assert (tmp_path / "value" / "value.safetensors").is_file()


def test_an_incompatible_jsonargparse_is_refused(monkeypatch):
    import jsonargparse._typehints

    monkeypatch.delattr(jsonargparse._typehints, "discard_init_args_on_class_path_change")
    with pytest.raises(ImportError, match=r"jsonargparse .* lacks discard_init_args_on_class_path_change, which svdd"):
        Parser()


def test_a_schedule_is_a_list_of_pairs(predict, tmp_path, read_rows):
    schedule = "[[0, 3], [0.5, 1]]"
    assert predict("--model.sampler", "ProgressivePruning", "--model.sampler.num_particles", "2",
                   "--model.sampler.schedule", schedule) == 0  # fmt: skip
    assert {row["ledger"]["denoiser_rows"] for row in read_rows(tmp_path / "run")} == {6 + 6 + 6}


def test_a_sampler_inside_a_sampler_is_chosen_by_name(predict, tmp_path, read_rows):
    settings = ["--model.sampler", "Refinement", "--model.sampler.rounds", "2", "--model.sampler.strength", "0.6"]
    settings += ["--model.sampler.sampler", "SVDD", "--model.sampler.sampler.num_candidates", "2"]
    assert predict(*settings) == 0
    assert {row["ledger"]["denoiser_rows"] for row in read_rows(tmp_path / "run")} == {(1 + 2 * 2) + 2 * (1 + 2)}
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert predict(*settings) == 0  # nothing is left to do
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    assert predict(*settings, "--model.sampler.sampler.num_candidates", "3") == 2  # another run


def test_later_configs_override_earlier_ones(config, tmp_path, read_rows):
    best = REPOSITORY / "configs" / "best_of_n.yaml"
    run = str(tmp_path / "run")
    arguments = ["--config", str(config), "--config", str(best), "--model.sampler.num_particles", "3", "--output", run]
    assert main(["predict", *arguments]) == 0
    assert read_rows(tmp_path / "run")[0]["ledger"]["denoiser_rows"] == 3 * 3


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_config_runs(path, sd15, tiny_clip, config, tmp_path, read_rows):
    """Each file runs with tiny models in place of hub models, fewer steps and one device."""
    settings = yaml.safe_load(path.read_text())
    text = path.read_text().replace("stable-diffusion-v1-5/stable-diffusion-v1-5", sd15)
    text = text.replace("openai/clip-vit-large-patch14", tiny_clip)
    (tmp_path / "adapted.yaml").write_text(text)
    base = ["--config", str(config)] if "data" not in settings else []  # an overlay needs a base configuration
    short = ["--model.diffusion.num_inference_steps", "2", "--data.limit", "2"]
    if "devices" in settings.get("trainer", {}):
        short += ["--trainer.accelerator", "cpu", "--trainer.num_nodes", "1", "--trainer.devices", "1"]
        short += ["--trainer.strategy", "auto"]
    run = str(tmp_path / "run")
    if path.name.startswith("fit_"):
        shorter = ["--data.num_rollouts", "6", "--data.cache", str(tmp_path / "cache"), "--trainer.max_epochs", "1"]
        assert main(["fit", "--config", str(tmp_path / "adapted.yaml"), *short, *shorter, "--output", run]) == 0
        assert (tmp_path / "run" / "value.safetensors").is_file()
        return
    if any(f"pretrained: emoji-{value}" in text for value in ("compressibility", "clipscore")):
        short = [*short[2:], "--model.sampler.num_candidates", "2"]  # the value was trained for its number of steps
    assert main(["predict", *base, "--config", str(tmp_path / "adapted.yaml"), *short, "--output", run]) == 0
    assert len(read_rows(tmp_path / "run")) == 2


def test_the_quick_commands_import_nothing_heavy():
    code = (
        "import sys; from svdd.__main__ import main\n"
        "for words in (['--help'], ['--version'], ['list']):\n"
        "    assert main(words) == 0\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import svdd.commands.compare, svdd.commands.report\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("SVDD", "BestOfN", "Unguided", "PosteriorMean", "CLIPScore", "StableDiffusion"):
        assert name in done.stdout


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["predcit"]) == 2
    assert "did you mean 'predict'?" in capsys.readouterr().err
    assert main(["list", "smaplers"]) == 2
    assert "got 'smapler'; did you mean 'sampler'?" in capsys.readouterr().err


def test_compare_puts_runs_side_by_side(predict, config, capsys, tmp_path):
    assert predict() == 0
    other = str(tmp_path / "plain")
    assert main(["predict", "--config", str(config), "--output", other, "--model.sampler", "Unguided"]) == 0
    picture = tmp_path / "compare.png"
    assert main(["compare", str(tmp_path / "run"), other, "--output", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "means over 3 images" in table
    assert Image.open(picture).width > 3 * 128
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "results.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_fit_a_value(config, tmp_path):
    """DDP expects gradients of all trainable parameters; the pretrained ones are excluded."""
    words = ["fit", "--config", str(fit_config(config)), "--data.num_rollouts", "140", "--data.batch_size", "64"]
    words += ["--data.cache", str(tmp_path / "cache"), "--trainer.max_epochs", "1", "--output", str(tmp_path / "value")]
    run_in_two(words, tmp_path / "log.txt")
    assert (tmp_path / "value" / "value.safetensors").is_file()
    (cache,) = (tmp_path / "cache").iterdir()
    assert len(list(cache.glob("rollouts-*.safetensors"))) == 3  # of 64, drawn by two


@pytest.mark.slow
def test_two_processes_draw_the_same_images(config, one_thread, tmp_path, read_rows):
    words = ["predict", "--config", str(config), "--data.batch_size", "1", "--model.sampler.alpha", "auto"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "json.py").write_text("raise SystemExit('from the working directory')")
    words += ["--output", str(tmp_path / "two"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "svdd", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert [row["sha256"] for row in one] == [row["sha256"] for row in two]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    for name in ("rewards", "choices", "resamplings", "spread", "ess", "alpha"):
        assert summaries[0][name] == summaries[1][name]
    assert summaries[0]["ledger"]["denoiser_rows"] == summaries[1]["ledger"]["denoiser_rows"]


def test_the_embedded_clips_are_out_of_place_on_a_larger_model(predict, capsys):
    sums = [
        "--model.reward",
        "CLIPScore + Brightness",
        "--data.limit",
        "1",
        "--model.diffusion.num_inference_steps",
        "1",
    ]
    assert predict(*sums) == 0
    assert "is for emoji" not in capsys.readouterr().err
    large = ["--model.diffusion.height", "256", "--model.diffusion.width", "256", "--overwrite"]
    assert predict(*sums, *large, "--model.eval_rewards", "CLIPScore(emoji-judge)") == 0
    said = capsys.readouterr().err
    assert "pretrained: emoji or emoji-judge is for emoji of 64 x 64 pixels only" in said
