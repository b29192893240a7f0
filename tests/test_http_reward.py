"""A reward on a server: the protocol, faults of the server, and runs that it guides."""

import asyncio
import io
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from svdd import RewardError, UserError
from svdd.__main__ import main
from svdd.rewards.columns import PromptText
from svdd.rewards.http_reward import HTTPReward
from svdd.rewards.jpeg import Compressibility
from tests.tested_rewards import PROMPTS, pictures
from tests.tiny_reward_models import brightness, chat_server, images_of_request

EXAMPLE = Path(__file__).parent.parent / "examples" / "reward_server.py"
QUICK = {"backoff": 0.001, "timeout": 20.0}


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="jpeg", quality=95)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("answer", ["object", "list"])
@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_the_server_receives_what_the_protocol_says(monkeypatch, image_format, answer):
    monkeypatch.setenv("MY_SERVER_KEY", "key-1 \n")
    monkeypatch.setenv("MY_TENANT", "t-7")
    images = pictures(4, 20, 31)
    said = {"object": brightness, "list": lambda body, handler: brightness(body)["scores"]}[answer]
    with chat_server(said) as (address, asked):
        reward = HTTPReward(
            address,
            label="bright",
            arguments={"model": "a", "options": {"top": 3}},
            columns=["count", "note"],
            image_format=image_format,
            batch_size=3,
            api_key_env="MY_SERVER_KEY",
            headers_env={"X-Tenant": "MY_TENANT"},
            **QUICK,
        )
        prompts = [PromptText(prompt, {"count": k, "note": "n", "other": 1}) for k, prompt in enumerate(PROMPTS)]
        scores = reward.score(images, prompts)
        with pytest.raises(RewardError, match="reward HTTPReward-bright needs column 'count' of the prompt"):
            reward.score(images, PROMPTS)
    assert reward.name == "HTTPReward-bright"
    first, second = sorted(asked, key=lambda request: -len(request["body"]["images"]))
    assert [request["body"]["prompts"] for request in (first, second)] == [PROMPTS[:3], PROMPTS[3:]]
    assert {*first["body"]} == {"images", "format", "prompts", "model", "options", "columns"}
    assert first["body"]["columns"] == [{"count": k, "note": "n"} for k in range(3)]
    assert (first["body"]["model"], first["body"]["options"]) == ("a", {"top": 3})
    assert (first["headers"]["Authorization"], first["headers"]["X-Tenant"]) == ("Bearer key-1", "t-7")
    sent = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    sent = sent if image_format == "png" else np.stack([jpeg(image) for image in sent])
    assert np.array_equal(images_of_request(first["body"]), sent[:3])
    assert np.array_equal(images_of_request(second["body"]), sent[3:])
    expected = sent.mean((1, 2, 3)) / 255 + [len(prompt) for prompt in PROMPTS]
    assert torch.equal(scores, torch.from_numpy(expected).float())
    assert "key-1" not in f"{reward!r} {vars(reward)} {reward.identity}"


def test_a_notebook_may_score_while_its_event_loop_runs():
    async def cell(address):
        return HTTPReward(address, **QUICK).score(pictures(1), PROMPTS[:1])

    with chat_server(brightness) as (address, _):
        assert asyncio.run(cell(address)).isfinite().all()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"<html>\x1b[1m hello", "the answer is not JSON: '<html>"),
        ({"detail": "x" * 1000}, 'one number per image]} or a list of numbers, got \'{"detail": "xxx'),
        ({"scores": [1.0, None]}, "or a list of numbers, got '{\"scores\": [1.0, null]}'"),
        ({"scores": [1.0, True]}, "or a list of numbers, got"),
        (json.dumps([10**400, 1]).encode(), "or a list of numbers, got"),
        (b"[NaN, 1]", "returned NaN or infinity for 1 of 2 images"),
        ({"scores": [1.0]}, "sent 2 images, got 1 scores"),
        ((422, {"detail": "no such model"}, {}), "422 Unprocessable Entity: no such model"),
        ((302, b"", {"Location": "http://127.0.0.1:9"}), "302 Found"),
        ((501, b"", {}), "501 Not Implemented"),
    ],
)
def test_a_wrong_answer_is_shown_in_one_line_and_not_asked_for_again(said, message):
    with chat_server(lambda body, handler: said) as (address, asked):
        with pytest.raises(RewardError) as caught:
            HTTPReward(address, **QUICK).score(pictures(2), PROMPTS[:2])
        assert len(asked) == 1
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "url must be an address such as"),
        ({"url": "http://me:secret@host/score"}, "url must be an address .*a run saves it"),
        ({"url": "http://host/\x00"}, "url must be an address"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"quality": 101}, "quality must be at most 100, got 101"),
        ({"image_format": "webp"}, "image_format must be png or jpeg, got 'webp'"),
        ({"arguments": {"images": []}}, "arguments must not contain images"),
        ({"arguments": {"a": float("nan")}}, "arguments must be JSON data"),
        ({"headers_env": {"X Y": "A_B"}}, "headers_env takes names of headers"),
        ({"retries": -1}, "retries must be >= 0, got -1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        HTTPReward(**{"url": "http://localhost/score", **arguments})
    assert "secret" not in str(caught.value)


def test_a_missing_variable_is_an_error_at_loading(monkeypatch):
    monkeypatch.delenv("MY_TENANT", raising=False)
    with pytest.raises(UserError, match="the environment variable MY_TENANT is not set"):
        HTTPReward("http://127.0.0.1:9/score", headers_env={"X-Tenant": "MY_TENANT"}).load()


def test_a_key_in_an_answer_is_not_shown(monkeypatch):
    monkeypatch.setenv("MY_SERVER_KEY", "secret-0123")
    said, shown = (lambda body, handler: {"echo": handler.headers["Authorization"]}), r"got .*Bearer \*\*\*"
    with chat_server(said) as (address, _), pytest.raises(RewardError, match=shown) as caught:
        HTTPReward(address, api_key_env="MY_SERVER_KEY").score(pictures(1), PROMPTS[:1])
    assert "secret" not in str(caught.value)


def test_two_hosts_are_one_reward_and_two_paths_are_two():
    one, moved = HTTPReward("http://a:1/score"), HTTPReward("https://b:2/score", timeout=1, retries=1)
    assert one.identity == moved.identity
    others = [HTTPReward("http://a:1/other"), HTTPReward("http://a:1/score", arguments={"model": "b"})]
    others.append(HTTPReward("http://a:1/score", image_format="jpeg"))
    assert all(other.identity != one.identity for other in others)


# ---- runs


def guide(output: Path, reward: dict, *words: str, prompts: int = 1) -> int:
    """Runs SVDD with a reward, on the embedded model unless told otherwise; returns the exit code."""
    small = ["--model.sampler.num_candidates", "3", *(words or ["--model.diffusion.num_inference_steps", "3"])]
    data = ["--data.prompts", json.dumps(["red apple", "blue car"][:prompts]), "--data.batch_size", "1"]
    given = ["--model.reward", json.dumps(reward), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    return main(["predict", *given, *small, *data, "--output", str(output)])


def remote(address: str, **arguments) -> dict:
    return {"class_path": "HTTPReward", "init_args": {"url": address, **QUICK, **arguments}}


def drawn(run: Path) -> list[tuple[bytes, list[float]]]:
    """Returns pixels and scores of each image."""
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return [(Image.open(run / row["file"]).tobytes(), [*row["rewards"].values()]) for row in rows]


def test_the_example_server_guides_like_the_local_reward_through_faults(tmp_path):
    """Images and scores are equal to the last bit, although every second request fails the first time."""
    with ExitStack() as stack:
        server = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(EXAMPLE), "Compressibility", "0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)},
            )
        )
        stack.callback(server.kill)
        assert guide(tmp_path / "local", {"class_path": "Compressibility"}) == 0
        address, calls = server.stdout.readline().strip(), count()

        def forward(body, handler):
            fault = next(calls) % 4
            if fault == 0:
                return 503, {"error": "restarting"}, {"Retry-After": "0"}
            if fault == 2:
                handler.connection.close()  # without an answer
                return None
            return httpx.post(address, json=body).content

        faulty, asked = stack.enter_context(chat_server(forward))
        assert guide(tmp_path / "remote", remote(faulty, batch_size=2)) == 0
        assert len(asked) >= 8
        assert drawn(tmp_path / "local") == drawn(tmp_path / "remote")
        direct = HTTPReward(address)
        direct.load()
        assert direct.version == "Compressibility 1"
        images = pictures(3)
        rounded = (images * 255).round() / 255
        assert torch.equal(direct.score(images, PROMPTS[:3]), Compressibility().score(rounded, PROMPTS[:3]))


def test_a_run_survives_an_outage_of_its_server(tmp_path, capsys):
    """It fails in one line, and the same command continues it, elsewhere too, but not with another version."""
    down, version, first = [False], ["a"], tmp_path / "run"
    stub = ("--model.diffusion", "tests.faults.stub.StubDiffusion")

    def answer(body, handler):
        if body["prompts"][0] == "blue car" and down[0]:
            return 503, {"error": "gone"}, {"Retry-After": "0"}
        return {**brightness(body), "version": version[0]}

    with chat_server(answer) as (address, _):
        assert guide(tmp_path / "whole", remote(address), *stub, prompts=2) == 0
        down[0] = True
        assert guide(first, remote(address, retries=2), *stub, prompts=2) == 2
        said = capsys.readouterr().err
        assert f"svdd: error: HTTPReward {address}: 503 Service Unavailable: gone after 3 attempts" in said
        assert f"HTTPReward {address}: 503 Service Unavailable: gone; attempt 3 of 3 follows" in said
    down[0] = False
    with chat_server(answer) as (address, asked):  # on another port
        assert guide(first, remote(address, timeout=5.0), *stub, prompts=2) == 0
        assert {prompt for request in asked for prompt in request["body"]["prompts"]} == {"blue car"}
        assert drawn(first) == drawn(tmp_path / "whole")
        assert guide(first, remote(address, arguments={"model": "b"}), *stub, prompts=2) == 2
        assert "model.reward.arguments" in capsys.readouterr().err
        reward = HTTPReward(address, **QUICK)
        reward.score(pictures(1), PROMPTS[:1])
        version[0] = "b"
        with pytest.raises(UserError, match="the server's version is 'b', but was 'a' when the run began"):
            reward.score(pictures(1), PROMPTS[:1])
