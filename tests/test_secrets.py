"""Passwords and keys in settings are neither written nor shown."""

import pytest
import yaml

from svdd import UserError
from svdd.__main__ import main
from svdd.rewards.base import Reward
from svdd.runs.config import differences, read_config, write_config
from svdd.runs.secrets import redact, redacted, refuse_secrets

KEY = "sk-proj-abcDEF1234567890"


class Remote(Reward):
    """A user's reward with a secret among its arguments."""

    def __init__(self, token="", address=""):
        super().__init__()
        self.token, self.address = token, address

    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:80/v1", "http://***host:80/v1"),
        ("http://user%40example.com/v1", "http://***example.com/v1"),
        ("see https://host/v1?api_key=abcdef&model=a", "see https://host/v1?api_key=***&model=a"),
        ("https://host/v1?x=1&access_token=abcdef", "https://host/v1?x=1&access_token=***"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        (f"got '{KEY}'", "got '***'"),
        ("hf_abcdefghijklmnop", "***"),
    ],
)
def test_secrets_are_recognised_by_their_form(text, shown):
    assert redact(text) == shown
    found = redacted({"any": [text]})["any"][0]
    assert found.startswith(shown)
    assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    ["a cat @ home", "basic watercolour", "bearer of good news for all", "http://localhost:8000/v1", "owner/name@main"],
)
def test_other_texts_stay(text):
    assert redacted({"prompts": [text], "tokenizer": text, "max_tokens": 3}) == {
        "prompts": [text],
        "tokenizer": text,
        "max_tokens": 3,
    }


def test_names_of_variables_stay():
    tree = {"api_key_env": "MY_SERVER_KEY", "headers_env": {"X-Api-Key": "MY_KEY", "Authorization": "MY_TOKEN"}}
    assert redacted(tree) == tree


def test_a_folder_records_that_a_secret_changed_but_not_which(tmp_path):
    one, other = ({"reward": {"init_args": {"token": token}}} for token in ("hunter2", "hunter3"))
    write_config(tmp_path, "predict", one)
    assert "hunter" not in (tmp_path / "config.yaml").read_text()
    recorded = read_config(tmp_path).config
    assert not differences(recorded, one)
    (changed,) = differences(recorded, other)
    assert changed.startswith("reward.token was '*** (")
    assert "hunter" not in changed


def test_a_reward_does_not_write_its_secret_into_the_files_of_values():
    assert Remote("hunter2", "http://host").identity == {"name": "Remote", "address": "http://host"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key_env": KEY}, "takes the name of an environment variable .*: no variable of the given name is set"),
        ({"api_key_env": "0123456789abcdef0123456789abcdef"}, "no variable of the given name is set"),
        ({"api_key_env": "SVDD_NO_SUCH_KEY"}, "no variable SVDD_NO_SUCH_KEY is set"),
        ({"endpoint": f"http://host/v1?key={KEY}"}, "without a user, a password or a query, which a run would save"),
        ({"endpoint": f"http://user%40{KEY}/v1"}, "without a user, a password or a query"),
        ({"endpoint": f"//user:{KEY}@host/v1"}, "must be an address such as"),
        ({"endpoint": f"https://host/v1#{KEY}"}, "must be an address such as"),
        ({"url": f"https://host/score?api_key={KEY}"}, "without a user, a password or a query, which a run would save"),
        ({"headers_env": {"X-Tenant": KEY}}, "takes the name of an environment variable .*: no variable of the given"),
    ],
)
def test_secrets_in_the_wrong_place_are_refused_without_being_repeated(settings, message):
    tree = {"model": {"eval_rewards": [{"class_path": "VLMJudge", "init_args": settings}]}}
    with pytest.raises(UserError, match=f"model.eval_rewards.0.{next(iter(settings))}.*{message}") as caught:
        refuse_secrets(tree)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("command", ["predict", "score"])
def test_a_key_in_place_of_a_variable_leaves_no_folder(tmp_path, command, capsys):
    option = "--reward" if command == "score" else "--model.reward"
    given = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": KEY}
    words = [option, "VLMJudge", *(word for name, value in given.items() for word in (f"{option}.{name}", value))]
    words += ["--images", str(tmp_path)] if command == "score" else ["--data.prompts", '["apple"]']
    assert main([command, *words, "--output", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr()
    assert f"{option[2:]}.api_key_env takes the name of an environment variable" in shown.err
    assert KEY not in shown.out + shown.err
    assert not (tmp_path / "run").exists()


def test_a_users_own_secrets_are_redacted_in_the_folder(tmp_path, capsys):
    reward = {
        "class_path": "tests.test_secrets.Remote",
        "init_args": {"token": "hunter2", "address": "http://me:pw@host"},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"reward": reward}}))
    words = ["--config", str(config), "--model.diffusion", "tests.faults.stub.StubDiffusion"]
    words += ["--model.sampler", "Unguided", "--data.prompts", '["apple"]', "--trainer.accelerator", "cpu"]
    assert main(["predict", *words, "--output", str(tmp_path / "run")]) == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"hunter2" not in written
    assert b"me:pw" not in written
    assert b"token: '*** (" in written
