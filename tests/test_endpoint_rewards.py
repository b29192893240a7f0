"""Rewards that ask a vision-language model behind an endpoint for a number: questions, answers, runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svdd import RewardError, UserError
from svdd.__main__ import main
from svdd.rewards.columns import PromptText
from svdd.rewards.models.answers import find_score
from svdd.rewards.models.vlm_endpoint import Answer
from svdd.rewards.rubric_judge import RubricJudge
from svdd.rewards.unified_reward import UnifiedReward
from tests.test_rewards import PROMPTS, pictures
from tests.tiny_reward_models import chat_server, logprobs, rubric_mark, rubric_server, seen_and_asked

QUICK = {"backoff": 0.001, "timeout": 20.0, "model": "tiny"}
RUBRIC = 'How well does this image show "{prompt}"?'


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


def text(said: str, **choice) -> dict:
    """Returns an answer without probabilities."""
    return {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop", **choice}]}


def unified(body: dict, handler=None) -> dict:
    """Answers like UnifiedReward: alignment, coherence and style grow with red, green and blue."""
    picture, question = seen_and_asked(body)
    red, green, blue = 1 + 4 * picture.mean((0, 1)) / 255
    if "Final Score" in question:
        return text(f"apple (object): 1\nred (attribute): 0\n\n**Final Score:** {red:.6f}")
    return text(f"Alignment Score (1-5): {red:.6f}\nCoherence Score (1-5): {green:.6f}\nStyle Score (1-5): {blue:.6f}")


def colours(images: torch.Tensor) -> torch.Tensor:
    """Returns what `unified` says of each colour, [n, 3]."""
    return 1 + 4 * (images * 255).round().mean((2, 3)) / 255


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({}, (1, 1, 1)),
        ({"alignment": 2, "coherence": 1, "style": 0}, (2, 1, 0)),
        ({"alignment": 0, "coherence": 0}, (0, 0, 1)),
        ({"form": "final"}, (1, 0, 0)),
    ],
)
def test_unified_reward_asks_the_published_question_and_reads_the_scores(arguments, weights):
    images = pictures(3)
    with chat_server(unified) as (address, asked):
        scores = UnifiedReward(endpoint=address, **QUICK, **arguments).score(images, PROMPTS[:3])
    expected = colours(images) @ torch.tensor(weights, dtype=torch.float32) / sum(weights)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert {request["path"] for request in asked} == {"/v1/chat/completions"}
    for request in asked:
        body = request["body"]
        assert {name: body[name] for name in body if name != "messages"} == {
            "model": "tiny",
            "max_tokens": 1024,
            "temperature": 0,
        }
        question = seen_and_asked(body)[1]
        assert question.startswith("You are given" if "form" in arguments else "You are presented")
        assert question.endswith(
            tuple(f"\nYour task is provided as follows:\nText Caption: [{p}]" for p in PROMPTS[:3])
        )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (text("Alignment Score (1-5): 3.5\nStyle Score (1-5): 2"), "holds no Coherence Score from 1 to 5"),
        (text("Alignment Score (1-5): 7\n"), "'Alignment Score (1-5): 7' holds no Alignment Score from 1 to 5"),
        (text(""), "the answer '' holds no Alignment Score"),
        (text("Alignment", finish_reason="length"), "cut off after max_tokens=1024 tokens"),
        (
            {"choices": [{"message": {"content": None, "refusal": "I cannot."}}]},
            "the model refused to answer: 'I cannot.'",
        ),
        ({"choices": []}, "the answer is no chat completion"),
    ],
)
def test_an_answer_without_scores_is_an_error_or_the_lowest_score(said, message):
    with chat_server(lambda body, handler: said) as (address, asked):
        with pytest.raises(RewardError) as caught:
            UnifiedReward(endpoint=address, **QUICK).score(pictures(1), PROMPTS[:1])
        assert str(caught.value).startswith(f"endpoint {address}, model 'tiny': ")
        assert message in str(caught.value)
        assert len(asked) == 1  # at temperature 0 the answer would be the same
        lenient = UnifiedReward(endpoint=address, on_unreadable="lowest", **QUICK)
        if said["choices"]:
            assert lenient.score(pictures(1), PROMPTS[:1]).tolist() == [1]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("4", 4),
        (" 4.5\n", 4.5),
        ("**4**", 4),
        ("4/5", 4),
        ("I would rate this 3 out of 5.", 3),
        ("Score: 2", 2),
        ("Two of 3 hands are right.\nFinal rating (1-5): 2\n", 2),
        ("Score: 1? No.\nScore: 5", 5),
        ("<think>1, 2 or 3?</think>\n3", 3),
        ("The answer is 4, since 4 is good.", 4),
        ("4 or 5", None),
        ("8/10", None),
        ("4/10", None),
        ("80%", None),
        ("6", None),
        ("-3", None),
        ("a4b", None),
        ("good", None),
        ("<think>It is 3", None),
    ],
)
def test_a_number_is_found_or_the_answer_is_unreadable(said, score):
    if score is None:
        with pytest.raises(ValueError, match="score from 1 to 5"):
            find_score(Answer(said), 1, 5)
    else:
        assert find_score(Answer(said), 1, 5) == score


def ask(said, **arguments) -> list[float]:
    with chat_server(lambda body, handler: said) as (address, _):
        return RubricJudge(endpoint=address, rubric=RUBRIC, **QUICK, **arguments).score(pictures(1), [""]).tolist()


def blank_first(said: dict) -> dict:
    """Puts a line feed before the answer, as some chat templates make models do."""
    content = said["choices"][0]["logprobs"]["content"]
    content.insert(0, {"token": "\n", "logprob": 0.0, "top_logprobs": [{"token": "\n", "logprob": 0.0}]})
    return said


def log(share: float) -> float:
    return math.log(share)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (logprobs(**{"4": log(0.6), "5": log(0.2), " 5": log(0.1), "The": log(0.1)}), (2.4 + 1.5) / 0.9),
        (blank_first(logprobs(**{"4": log(0.5), "\u01203": log(0.5)})), 3.5),
        (logprobs(**{"2": log(0.9), "9": log(0.1)}), 2),  # outside the scale
        (logprobs(**{"4": log(0.3), "So": log(0.7)}), 4),  # not sure of a mark: the text counts
        (text("3"), 3),
    ],
)
def test_the_score_is_the_expected_mark(said, score):
    assert ask(said) == pytest.approx([score], rel=1e-6)


def test_a_scale_of_several_digits_is_read_from_the_answer():
    assert ask(logprobs(**{"1": log(0.9), "7": log(0.1)}) | text("10"), lowest=1, highest=10) == [10]


def test_a_rubric_asks_each_criterion_alone():
    images, criteria = pictures(2), {"hands": 3.0, "light and colour": 1.0, "unused": 0.0}
    with chat_server(rubric_server) as (address, asked):
        rubric = "Judge {criterion} in {prompt} ({count})."
        reward = RubricJudge(endpoint=address, rubric=rubric, criteria=criteria, label="x", highest=7, **QUICK)
        scores = reward.score(images, [PromptText(prompt, {"count": "{prompt}"}) for prompt in PROMPTS[:2]])
    end = "\n\nAnswer with a whole number from 1 (worst) to 7 (best), and nothing else."
    questions = {(p, c): f"Judge {c} in {p} ({{prompt}}).{end}" for p in PROMPTS[:2] for c in [*criteria][:2]}
    assert sorted(seen_and_asked(request["body"])[1] for request in asked) == sorted(questions.values())
    for request in asked:
        body = request["body"]
        assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (16, 0, True, 20)
    marks = [
        [rubric_mark(image.permute(1, 2, 0).numpy(), questions[prompt, c]) for c in [*criteria][:2]]
        for image, prompt in zip((images * 255).round(), PROMPTS, strict=False)
    ]
    assert scores.tolist() == pytest.approx([(3 * hands + light) / 4 for hands, light in marks], abs=1e-5)
    assert reward.name == "RubricJudge-x"
    assert reward.identity["criteria"] == criteria
    assert "endpoint" not in reward.identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rubric": "  "}, "rubric must be a text or a file"),
        ({"rubric": "nowhere/rubric.txt"}, "rubric='nowhere/rubric.txt' cannot be read as a text file"),
        ({"lowest": 5}, "the scale needs whole numbers lowest < highest, got 5 and 5"),
        ({"criteria": {"hands": 1.0}}, "criteria and {criterion} in the rubric belong together"),
        ({"rubric": "{criterion}"}, "criteria and {criterion} in the rubric belong together"),
        ({"rubric": "{criterion}", "criteria": {"a": 0.0}}, "weights of criteria must be >= 0, and one of them > 0"),
        ({"rubric": "{criterion}", "criteria": {"a": 1.0, "b": math.nan}}, "weights of criteria must be >= 0"),
        ({"on_unreadable": "skip"}, "on_unreadable must be raise or lowest"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"endpoint": "http://me:secret@host/v1"}, "endpoint must be an address"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"endpoint": "http://localhost/v1", "rubric": RUBRIC, "model": "m", **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        RubricJudge(**given).load()
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="weights of aspects must be >= 0"):
        UnifiedReward(endpoint="http://localhost/v1", model="m", style=-1)


def test_a_rubric_guides_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The recorded reward is that of the saved picture, and a run continues only with the same rubric."""
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret-value")
    (tmp_path / "rubric.txt").write_text(f"{RUBRIC}\n")
    run = tmp_path / "run"
    with chat_server(rubric_server) as (address, asked):
        words = ["predict", "--model.diffusion", "tests.faults.stub.StubDiffusion", "--trainer.accelerator", "cpu"]
        words += ["--data.prompts", '["apple", "owl"]', "--model.sampler.num_candidates", "3", "--output", str(run)]
        for name, value in {
            "endpoint": address,
            "model": "tiny",
            "rubric": str(tmp_path / "rubric.txt"),
            "api_key_env": "JUDGE_KEY",
        }.items():
            words += [f"--model.reward.{name}", value]
        words[1:1] = ["--model.reward", "RubricJudge"]
        assert main(words) == 0
        assert {request["headers"]["Authorization"] for request in asked} == {"Bearer sk-very-secret-value"}
        (tmp_path / "rubric.txt").write_text("Something else about {prompt}.")
        assert main([*words, "--data.prompts", '["apple", "owl", "car"]']) == 2
    said = capsys.readouterr()
    assert "other contents of reward RubricJudge" in said.err
    for line in (run / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = RUBRIC.replace("{prompt}", row["prompt"])
        question += "\n\nAnswer with a whole number from 1 (worst) to 5 (best), and nothing else."
        mark = rubric_mark(np.asarray(Image.open(run / row["file"])), question)
        assert row["rewards"]["RubricJudge"] == pytest.approx(mark, abs=1e-5)
    written = b"".join(path.read_bytes() for path in Path(run).rglob("*") if path.is_file())
    assert b"sk-very-secret" not in written + f"{said}".encode()
