"""A user's own files: functions as rewards by their path, and tracebacks of errors, wherever they are raised."""

import json
import re
import sys

import pytest
import torch
from PIL import Image

from svdd import Incomplete, RewardError
from svdd.__main__ import main
from svdd.rewards.function import FunctionReward
from svdd.runs.folder import RunFolder
from svdd.runs.tracebacks import users_traceback

FILES = {
    "own_syntax": "def red(images, prompts)\n    return images\n",
    "own_import": "import no_such_library\n",
    "own_table": "TABLE = {}\nTABLE['b']\n",
    "own_code": """
import os
from torch import Tensor
from PIL import Image
from svdd.rewards import Reward
from svdd.samplers import Unguided

class Thing: pass

class Missing(Reward):
    def __init__(self, kind: str = "AttributeError"):
        super().__init__()
        if kind == "AttributeError":
            self.scale = kind.scale
        raise ValueError("no scale")
    def forward(self, images, prompts):
        return images.mean((1, 2, 3))

class Sampler(Unguided):
    def sample(self, start, value):
        return start.no_such_method()

def red(images: Tensor, prompts, scale: float = 1.0, skip: str = ""):
    if skip and skip in prompts:
        check(skip, password="open sesame")
    return scale * images[:, 0].mean((1, 2))

def check(word, password):
    raise KeyError(word + " " + os.environ.get("OWN_API_KEY", ""))

def first_pixel(image: Image.Image, prompt, *, scale: float):
    assert isinstance(prompt, str)
    return scale * image.getpixel((0, 0))[0] / 255

def first_pixels(images: "list[Image.Image]", prompts):
    return [first_pixel(*pair, scale=1) for pair in zip(images, prompts)]

def puzzled(image, prompt):
    return image.getpixel((0, 0))[0]
""",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The files in the working directory."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def words(sd15, *more: str) -> list[str]:
    small = ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "1", "--output", "run"]
    small += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.prompts", '["apple", "car"]']
    return ["predict", *small, "--model.sampler", "Unguided", *more]


@pytest.mark.parametrize(
    ("more", "shown", "last"),
    [
        (
            ["--model.reward", "own_syntax.red"],
            r"own_syntax\.py\", line 1\n +def red.*\n +\^",
            "SyntaxError: expected ':'",
        ),
        (["--model.value", "own_import.Value"], r"own_import\.py\", line 1", "No module named 'no_such_library'"),
        (
            ["--model.eval_rewards+=own_table.Red"],
            r"own_table\.py\", line 2",
            "'own_table.Red' cannot be used: KeyError",
        ),
        (["--model.reward", "own_code.Missing"], r"self\.scale = kind\.scale", "'str' object has no attribute 'scale'"),
        (["--model.reward", "own_code.Missing", "--model.reward.kind", "x"], "raise ValueError", "error: no scale"),
        (
            ["--model.sampler", "own_code.Sampler"],
            r"start\.no_such_method\(\)",
            "AttributeError: 'Start' object has no",
        ),
        (["--model.reward", "own_code.puzzled"], r"image\.getpixel", "annotate its first parameter with list[PIL"),
        (["--model.reward.help", "own_syntax.red"], r"own_syntax\.py\", line 1", "SyntaxError: expected ':'"),
        (["--model.reward", "own_code.rred"], None, "has no attribute 'rred'; did you mean 'red'?"),
        (["--model.reward", "own_code.os"], None, "it is a module; expected a class or a function"),
        (["--model.reward", "own_code.Thing"], None, "not a subclass of Reward; derive it from svdd.rewards.Reward"),
        (
            ["--model.reward", "own_code.first_pixel"],
            None,
            "missing a required argument: 'scale'; it takes by name",
        ),
        (
            ["--model.reward", "own_nothing.red"],
            None,
            "No module named 'own_nothing' (the working directory is searched",
        ),
    ],
)
def test_an_error_shows_the_users_lines_and_ours_last(own, sd15, capsys, more, shown, last):
    reward = [] if "--model.reward" in more else ["--model.reward", "Brightness"]
    assert main(words(sd15, *reward, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("svdd: error: ")
    assert last in lines[-1]
    assert "SVDD_DEBUG" not in lines[-1]
    above = "\n".join(lines[:-1])
    assert re.search(shown, above) if shown else not above
    assert "svdd/" not in above.replace(str(own), "")


def test_a_skipped_prompt_shows_its_traceback_without_secrets(own, sd15, capsys, monkeypatch):
    monkeypatch.setenv("OWN_API_KEY", "the-real-key")
    reward = ["--model.reward", "own_code.red", "--model.reward.arguments.skip", "car"]
    with pytest.raises(Incomplete):
        main(words(sd15, *reward, "--model.reward.arguments.scale", "2", "--model.on_error", "skip"))
    said = capsys.readouterr().err
    assert 'check(skip, password="***")' in said
    assert "svdd: skipped 'car': RewardError: reward red failed with KeyError: 'car ***'" in said
    assert "sesame" not in said
    (failed,) = [json.loads(line) for line in (own / "run" / "failed.jsonl").read_text().splitlines()]
    assert failed["traceback"] in said
    assert "the-real-key" not in said + json.dumps(failed)
    (row,) = RunFolder(own / "run").rows()
    assert 0 < row["rewards"]["red"] < 2
    config = (own / "run" / "config.yaml").read_text()
    assert "class_path: svdd.rewards.function.FunctionReward\n    init_args:\n      function: own_code.red\n" in config


def test_functions_are_rewards_in_yaml_in_studies_and_in_score(own, sd15, capsys):
    (own / "two.yaml").write_text(
        "model:\n  reward: {class_path: own_code.first_pixel, init_args: {arguments: {scale: 2}}}\n"
        "  eval_rewards: [own_code.first_pixels, own_code.red(scale=0.5)]\n"
    )
    assert main([*words(sd15), "--config", "two.yaml"]) == 0
    for row in RunFolder(own / "run").rows():
        scores, picture = row["rewards"], Image.open(own / "run" / row["file"])
        assert scores["first_pixel"] == pytest.approx(2 * picture.getpixel((0, 0))[0] / 255)
        assert 0 < scores["red"] < 0.5
        assert scores["first_pixels"] == pytest.approx(scores["first_pixel"] / 2)
    scored = ["--reward", "own_code.first_pixel", "--reward.arguments.scale", "1", "--eval_rewards+=own_code.red"]
    assert main(["score", "--images", "run", *scored]) == 0
    assert re.search(r"first_pixel: mean .*\nred: mean", capsys.readouterr().out)
    (own / "study.yaml").write_text(
        "base: two.yaml\nvariants: {fails: {model.reward: own_code.red, model.reward.arguments.skip: car}}\n"
    )
    more = [word for word in words(sd15)[1:] if word not in ("--output", "run")]
    with pytest.raises(Incomplete):
        main(["study", "study.yaml", *more, "--model.eval_rewards", "[]", "--output", "study"])
    said = capsys.readouterr().err
    assert said.count("raise KeyError(word") == 1
    assert "svdd: fails failed: reward red failed with KeyError: 'car '\n" in said
    (own / "wrong.yaml").write_text("base: two.yaml\nvariants: {a: {model.reward: own_syntax.red}}\n")
    assert main(["study", "wrong.yaml", "--output", "wrong"]) == 2
    assert 'own_syntax.py", line 1' in capsys.readouterr().err


def test_what_a_function_takes_follows_from_its_signature(own):
    import importlib

    sys.path.append(str(own))
    code = importlib.import_module("own_code")
    images = torch.rand(3, 3, 4, 4).mul(255).round() / 255
    prompts = ["a", "b", "c"]
    expected = images[:, 0, 0, 0]
    torch.testing.assert_close(FunctionReward(code.first_pixels).score(images, prompts), expected)
    torch.testing.assert_close(
        FunctionReward(code.first_pixel, arguments={"scale": 2}).score(images, prompts), 2 * expected
    )
    one, other = (
        FunctionReward(code.red, arguments={"scale": 2}),
        FunctionReward("own_code.red", arguments={"scale": 3}),
    )
    assert one.identity["arguments"] == {"scale": 2} != other.identity["arguments"]
    torch.testing.assert_close(one.score(images, prompts) / 2, other.score(images, prompts) / 3)

    def images_only(images, scale=1.0):
        return images.mean((1, 2, 3)) * scale

    def with_texts(images, texts=None):
        return [float(len(text)) for text in texts]

    assert torch.equal(FunctionReward(images_only).score(images, prompts), images.mean((1, 2, 3)))
    assert FunctionReward(with_texts).score(images, ["a", "bb", ""]).tolist() == [1, 2, 0]

    class Network(torch.nn.Module):
        forward = staticmethod(images_only)

    assert torch.equal(FunctionReward(Network()).score(images, prompts), images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"red.* cannot be called as red.*no argument 'scael', did you mean 'scale'"):
        FunctionReward(code.red, arguments={"scael": 1})
    with pytest.raises(ValueError, match="PIL images, which have no gradient"):
        FunctionReward(code.first_pixels, differentiable=True)
    with pytest.raises(RewardError, match=r"got a float tensor \[3, 3, 4, 4\]; if it takes PIL images"):
        FunctionReward(code.puzzled).score(images, prompts)


def test_causes_within_the_users_code_are_shown_and_library_frames_are_not(own):
    (own / "own_causes.py").write_text(
        "import json\ndef f(text):\n    try:\n        return json.loads(text)\n"
        "    except ValueError as error:\n        raise RuntimeError('no table') from error\n"
    )
    sys.path.append(str(own))
    import own_causes

    with pytest.raises(RuntimeError) as caught:
        own_causes.f("{")
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # without this file
    shown = users_traceback(caught.value)
    assert shown.count("own_causes.py") == 2
    assert shown.count("json/decoder.py") == 1
    assert shown.index("JSONDecodeError: ") < shown.index("direct cause of") < shown.index("RuntimeError: no table")
    del sys.modules["own_causes"]


BAD_REWARDS = """
import torch
from svdd.rewards import Reward, Brightness

class Batch(Reward):
    differentiable, range = True, (0.0, 0.1)
    def __init__(self):
        super().__init__()
        self.table = torch.ones(3)
        self.layer = torch.nn.Linear(1, 1)
    def forward(self, images, prompts):
        images -= images.mean()
        return images.mean((1, 2, 3)).detach() + self.layer.weight[0, 0].detach() + torch.rand(len(images))

class Slope(Brightness):
    def forward(self, images, prompts):
        return (images * images.detach()).mean((1, 2, 3))

class Flipped(Reward):
    def forward(self, images, prompts):
        return images.mean((1, 2, 3)).sort().values

class Crash(Reward):
    def forward(self, images, prompts):
        return images[:, 5].mean((1, 2))
"""


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        (
            "Batch",
            [
                "have no influence",
                "second call",
                "not changed",
                "range",
                "gradient",
                "moves",
                "loads",
                "second process",
            ],
        ),
        ("Slope", ["gradient"]),
        ("Flipped", ["any order", "no influence"]),
        ("Crash", ["one finite number"]),
    ],
)
def test_test_reward_says_what_fails(own, capsys, name, failing):
    (own / "own_bad.py").write_text(BAD_REWARDS)
    with pytest.raises(SystemExit) as ended:
        main(["test-reward", f"own_bad.{name}", "--device", "cpu"])
    assert ended.value.code == 1
    out, said = capsys.readouterr()
    failed = [line for line in out.splitlines() if line.startswith("  FAIL")]
    assert all(any(words in line for line in failed) for words in failing), out
    assert len(failed) == len(failing) or name in ("Batch", "Crash")
    assert "checks failed" in said
    assert (said.count("images[:, 5]"), name) in ((1, "Crash"), (0, name))
    del sys.modules["own_bad"]


def test_test_reward_takes_functions_pictures_and_arguments(own, capsys, sd15):
    assert main(["test-reward", "own_code.first_pixel", "--reward.arguments.scale", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "first_pixel on cpu, 4 pictures of 64 x 64" in out
    assert "scores: 2, " in out
    (own / "pictures").mkdir()
    for k, colour in enumerate(["red", "blue", "white"]):
        Image.new("RGB", (20 + k, 16), colour).save(own / "pictures" / f"{k}.png")
    assert main(["test-reward", "own_code.red", "--images", "pictures", "--prompts", '["a", "b", "c"]']) == 0
    assert "3 pictures of 20 x 16\n" in capsys.readouterr().out
    assert main(["test-reward", "Similarity", "--reward.features", "clip"]) == 2
    assert "needs the column" in capsys.readouterr().err


def test_test_reward_with_prompts_that_a_reward_refuses(own, capsys):
    (own / "own_choosy.py").write_text(
        "from svdd import UserError\n"
        "from svdd.rewards import Brightness\n"
        "class Choosy(Brightness):\n"
        "    def check_prompt(self, prompt):\n"
        "        if 'sign' not in prompt:\n"
        "            raise UserError(f'{prompt!r} names no sign')\n"
        "    def forward(self, images, prompts):\n"
        "        for prompt in prompts:\n"
        "            self.check_prompt(prompt)\n"
        "        return super().forward(images, prompts)\n"
    )
    words = ["test-reward", "own_choosy.Choosy", "--device", "cpu"]
    assert main(words) == 2
    assert "'a red disc on a white background' names no sign; --prompts FILE gives others" in capsys.readouterr().err
    assert main([*words, "--prompts", '["a sign", "two signs"]']) == 0
    assert "skip  empty and long prompts have scores: check_prompt refuses them: '' names" in capsys.readouterr().out


def test_test_reward_accepts_a_constraint_that_holds_for_some_pictures(capsys):
    assert main(["test-reward", "Threshold(Brightness, at_least=0.5)", "--device", "cpu"]) == 0
    assert "pass  the gradient is the slope" in capsys.readouterr().out
