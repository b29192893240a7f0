"""Columns of the prompt file that rewards read: contract, checks before anything is drawn, and paths."""

import copy
import json
import pickle

import pytest
import torch

from svdd import RewardError, UserError
from svdd.__main__ import main
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.columns import PromptText, column, column_path, columns_of
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.runs.prompts import PromptDataModule, PromptDataset
from svdd.runs.rows import Prompt
from svdd.samplers.unguided import Unguided
from tests.analytic import MixtureDiffusion

REWARD = '''
"""Distance of the brightness to a wanted one."""

import torch

from svdd.rewards import Reward
from svdd.rewards.columns import column, column_path
from svdd.rewards.models.pixels import luma

class Wanted(Reward):
    """Minus the distance of the brightness to the column `wanted`."""

    columns, optional_columns, path_columns = ("wanted", "picture"), ("weight",), ("picture",)

    def forward(self, images, prompts):
        wanted = torch.tensor([float(column(prompt, "wanted")) for prompt in prompts])
        assert all(column_path(prompt, "picture").read_text() == "here" for prompt in prompts)
        weight = torch.tensor([float(column(prompt, "weight") or 1) for prompt in prompts])
        return -weight * (luma(images).mean((1, 2)) - wanted).abs()
'''


class Wanted(Reward):
    """The column `wanted` itself."""

    columns, optional_columns = ("wanted",), ("weight",)

    def forward(self, images, prompts):
        return torch.tensor([float(column(prompt, "wanted")) for prompt in prompts])


class Perhaps(Reward):
    """The column `weight`, and -1 without it."""

    optional_columns = ("weight",)

    def forward(self, images, prompts):
        return torch.tensor([float(column(prompt, "weight") or -1) for prompt in prompts])


def test_a_prompt_with_columns_is_a_str_that_differs_by_its_columns():
    one, other, plain = PromptText("a", {"wanted": 1}, "there"), PromptText("a", {"wanted": 2}), "a"
    assert one != other
    assert one == plain == other
    assert hash(one) == hash(plain)
    assert list(dict.fromkeys([one, other, PromptText("a", {"wanted": 2})])) == [one, other]
    assert json.dumps([one]) == '["a"]'
    assert type(str(one)) is str
    assert f"{one!r}" == "'a'"
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert copied == one
        assert copied.columns == {"wanted": 1}
    assert column(one, "wanted") == 1
    assert column(one, "other") is None
    assert column(plain, "wanted") is None
    assert column(PromptText("a", {"wanted": " "}), "wanted") is None
    assert str(column_path(PromptText("a", {"picture": "b.png"}, "there"), "picture")) == "there/b.png"
    assert str(column_path(PromptText("a", {"picture": "/b.png"}, "there"), "picture")) == "/b.png"


def test_containers_unite_the_columns_of_their_parts():
    found = columns_of(WeightedSum([Threshold(Wanted(), at_least=0.0), Wanted()]))
    assert found.needed == {"wanted": "Wanted"}
    assert found.optional == {"weight": "Wanted"}


def test_equal_prompts_with_other_columns_are_told_apart():
    diffusion = MixtureDiffusion(num_inference_steps=3)
    model = GuidedDiffusion(Wanted(), diffusion, Unguided())
    batch = [Prompt(k, "a", None, None, {"wanted": k, "other": 5}) for k in range(3)]
    assert [row["rewards"]["Wanted"] for row in model.predict(batch).rows] == [0, 1, 2]
    prompts = [PromptText("a", {"wanted": 3}), PromptText("a", {"wanted": 4})]
    assert model.sample(prompts)[1].tolist() == [3, 4]
    model = GuidedDiffusion(Perhaps(), diffusion, Unguided())
    batch = [Prompt(k, "a", None, None, columns) for k, columns in enumerate([{}, {"weight": 2}, {}])]
    assert [row["rewards"]["Perhaps"] for row in model.predict(batch).rows] == [-1, 2, -1]
    assert model.sample(["a", PromptText("a", {"weight": 2}), "a"])[1].tolist() == [-1, 2, -1]


def test_a_missing_column_is_an_error():
    model = GuidedDiffusion(Wanted(), MixtureDiffusion(num_inference_steps=3), Unguided())
    with pytest.raises(RewardError, match="Wanted needs column 'wanted' of the prompt 'a'"):
        model.sample(["a"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("prompt,wanted,picture\n\na,0.2,there.txt\nb,,there.txt\n", "line 4: column 'wanted' is blank, which Wanted"),
        (
            "prompt,want,picture\na,0.2,there.txt\n",
            "line 2: there is no column 'wanted', which Wanted needs; other",
        ),
        ("prompt,wanted,picture\na,0.2,nowhere.txt\n", "line 2: column 'picture', which Wanted reads: there is no fi"),
    ],
)
def test_a_missing_column_is_an_error_before_anything_is_drawn(rows, message, workspace, capsys):
    (workspace / "my_wanted.py").write_text(REWARD)
    folder = workspace / "prompts"
    folder.mkdir()
    (folder / "there.txt").write_text("here")
    (folder / "prompts.csv").write_text(rows)
    words = ["predict", "--model.reward", "my_wanted.Wanted", "--data.prompts", "prompts/prompts.csv"]
    assert main([*words, "--output", "run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "prompts/prompts.csv: " in line
    assert message in line
    assert not list(workspace.glob("run/images/*"))
    if "nowhere" not in rows:
        return
    study = f"base: quickstart\nsettings: {{model.reward: my_wanted.Wanted, data.prompts: {folder}/prompts.csv}}\n"
    (workspace / "study.yaml").write_text(f"{study}variants: {{plain: {{model.sampler: Unguided}}}}\n")
    assert main(["study", "study.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_runs_scores_and_resumption_with_columns(workspace, sd15, capsys, read_rows):
    (workspace / "my_wanted.py").write_text(REWARD)
    folder = workspace / "prompts"
    folder.mkdir()
    (folder / "there.txt").write_text("here")
    (folder / "p.csv").write_text("prompt,wanted,picture,weight\na,0,there.txt,\na,1,there.txt,2\n")
    words = ["predict", "--model.reward", "my_wanted.Wanted", "--model.diffusion", "StableDiffusion"]
    words += ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "2"]
    words += ["--model.sampler", "Unguided", "--data.prompts", "prompts/p.csv", "--trainer.accelerator", "cpu"]
    assert main([*words, "--model.eval_rewards+=Brightness", "--output", "run"]) == 0
    rows = read_rows("run")
    mean = [row["rewards"]["Brightness"] for row in rows]
    assert [row["rewards"]["Wanted"] for row in rows] == pytest.approx([-mean[0], -2 * (1 - mean[1])], abs=1e-4)
    assert [row["wanted"] for row in rows] == ["0", "1"]
    (folder / "there.txt").write_text("there")
    (folder / "more.txt").write_text("here")
    assert main([*words, "--model.eval_rewards+=Brightness", "--output", "run"]) == 2
    assert "run was begun with other contents of files that the prompts name: restore" in capsys.readouterr().err
    (folder / "there.txt").write_text("here")
    with open(folder / "p.csv", "a") as file:
        file.write("c,1,more.txt,\n")
    assert main([*words, "--model.eval_rewards+=Brightness", "--output", "run"]) == 0
    rows = read_rows("run")
    assert len(rows) == 3
    capsys.readouterr()
    score = ["score", "--reward", "my_wanted.Wanted", "--device", "cpu", "--output", "scores"]
    (workspace / "pictures").mkdir()
    for k, file in enumerate(sorted((workspace / "run" / "images").glob("*.png"))):
        (workspace / "pictures" / f"{k}.png").write_bytes(file.read_bytes())
    for words in (["run"], ["pictures", "--prompts", "prompts/p.csv"], ["pictures", "--prompts", "run/prompts.jsonl"]):
        assert main([*score, "--images", *words]) == 0, capsys.readouterr().err
        scores = [json.loads(line) for line in (workspace / "scores" / "scores.jsonl").read_text().splitlines()]
        assert [entry["rewards"]["Wanted"] for entry in scores] == pytest.approx(
            [row["rewards"]["Wanted"] for row in rows], abs=0.01
        )
    capsys.readouterr()
    assert main([*score, "--images", "pictures", "--prompts", '["a", "b", "c"]']) == 2
    assert "prompts: prompt 0: there is no column 'wanted', which Wanted needs" in capsys.readouterr().err


def test_many_prompts_need_no_memory(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "p{k}", "wanted": {k}}}\n' for k in range(2_000)) + '{"prompt": "last"}\n')
    dataset = PromptDataset(str(path))
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(UserError, match=r"p\.jsonl: line 2001: there is no column 'wanted'"):
        columns_of(Wanted()).check(dataset, dataset.place)
    assert tracemalloc.get_traced_memory()[1] < 2**19
    tracemalloc.stop()
    data = PromptDataModule(str(path), limit=2_000)
    columns_of(Wanted()).check(data.dataset, data.dataset.place)
