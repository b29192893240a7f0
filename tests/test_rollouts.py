"""Rollout caches shared by trainings: other numbers of rollouts, other models, and concurrent runs."""

import subprocess
import sys

import lightning as L
import pytest
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from svdd import UserError
from svdd.__main__ import main
from svdd.commands.fit import _HARMLESS
from svdd.rewards.base import Reward
from svdd.runs.config import differences
from svdd.values.training.data import RolloutDataModule
from svdd.values.training.fitting import ValueFitting
from svdd.values.training.rollouts import RolloutCache
from tests.analytic import GaussianDiffusion, Linear
from tests.test_learned_values import B, fit, network


def train(cache, num_rollouts, diffusion=None, **options):
    """Trains for a short time; returns the value's weights, the data and the number of denoiser rows."""
    diffusion = diffusion or GaussianDiffusion(3)
    options = {"epochs": 1, "batch_size": 64, **options}
    model, data, _ = fit(network(), cache, diffusion, num_rollouts=num_rollouts, **options)
    return model.value.state_dict(), data, sum(diffusion.denoised_rows)


def trainer():
    """Returns a silent Trainer for one epoch."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0, **quiet)


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


# ---- the number of rollouts


def test_the_number_of_rollouts_may_change(tmp_path):
    """Only the missing rollouts are drawn, and the values equal those trained on separate caches."""
    fresh = {count: train(tmp_path / str(count), count, prompts=("0", "1"))[0] for count in (100, 101, 200)}
    for count, rows in ((100, 100 * 3), (200, (64 + 64 + 8) * 3), (100, 0), (101, 0), (200, 0)):
        state, data, drawn = train(tmp_path / "one", count, prompts=("0", "1"))
        assert drawn == rows, count
        assert sum(len(shard["end"]) for shard in data.states[0].shards) == count
        assert_same(state, fresh[count])


def test_a_longer_shard_is_still_checked_when_fewer_are_wanted(tmp_path):
    train(tmp_path, 200)
    (folder,) = tmp_path.iterdir()
    path = folder / "rollouts-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert train(tmp_path, 100)[2] == 36 * 3
    path = folder / "rollouts-00002.safetensors"  # beyond these 100, but recorded
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert train(tmp_path, 200)[2] == (64 + 64) * 3


# ---- continued trainings


@pytest.fixture
def command(sd15, prompts_file, tmp_path):
    """Returns a function that builds `svdd fit` on a tiny model with further arguments."""
    value = {"class_path": "LatentConvValue", "init_args": {"channels": 8, "num_blocks": 1}}
    diffusion = {"class_path": "StableDiffusion", "init_args": {"pretrained": sd15, "num_inference_steps": 3}}
    settings = {
        "model": {"reward": "Compressibility", "diffusion": diffusion, "value": value},
        "data": {"prompts": str(prompts_file), "num_rollouts": 12, "batch_size": 8, "cache": str(tmp_path / "cache")},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda *words: ["fit", "--config", str(path), "--output", str(tmp_path / "value"), *words]


def test_a_training_continues_only_with_the_same_prompts_and_settings(command, prompts_file, tmp_path, capsys):
    failing = command("--data.batch_size", "4", "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00")
    assert main(failing) == 2  # no checkpoint yet, so settings may still change
    assert main(command()) == 0
    capsys.readouterr()
    assert main(command("--data.batch_size", "4", "--trainer.gradient_clip_val", "1")) == 2
    message = capsys.readouterr().err
    assert "data.batch_size was 8, now 4" in message
    assert "trainer.gradient_clip_val was None, now 1" in message
    prompts_file.write_text(prompts_file.read_text().replace("panda", "pandas"))
    assert main(command("--trainer.max_epochs", "2")) == 2
    assert "prompt 2: was 'panda', now 'pandas'" in capsys.readouterr().err
    prompts_file.write_text(prompts_file.read_text().replace("pandas", "panda\nowl"))
    assert main(command("--trainer.max_epochs", "2")) == 2
    assert "other prompts: 3 prompts became 4. Choose another" in capsys.readouterr().err
    prompts_file.write_text(prompts_file.read_text().replace("owl\n", ""))
    assert main(command("--trainer.max_epochs", "2", "--data.rollout_batch_size", "3")) == 0
    assert torch.load(tmp_path / "value" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_a_training_does_not_continue_with_another_reward_of_the_same_name(command, tmp_path, capsys, monkeypatch):
    code = tmp_path / "reward_of_a_user.py"
    code.write_text("from svdd.rewards.brightness import Brightness\n\n\nclass Mine(Brightness):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--model.reward", "reward_of_a_user.Mine")
    assert main(command(*words)) == 0
    before = (tmp_path / "value" / "checkpoints" / "last.ckpt").read_bytes()
    code.write_text(code.read_text() + "    factor = 2\n")
    assert main(command(*words, "--trainer.max_epochs", "2")) == 2
    error = capsys.readouterr().err
    assert "the training was begun with other contents of the code of reward_of_a_user: restore what was there" in error
    assert (tmp_path / "value" / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("trainer.max_epochs", False),
        ("trainer.max_time", False),
        ("trainer.devices", False),
        ("trainer.strategy", False),
        ("trainer.callbacks", False),
        ("trainer.logger", False),
        ("trainer.precision", True),
        ("trainer.accumulate_grad_batches", True),
        ("trainer.gradient_clip_val", True),
        ("trainer.limit_train_batches", True),
        ("output", False),
        ("max_restarts", False),
        ("data.cache", False),
        ("data.rollout_batch_size", False),
        ("data.batch_size", True),
        ("data.num_rollouts", True),
        ("seed_everything", True),
        ("model.value", True),
        ("model.diffusion.init_args.chunk_size", False),
        ("model.diffusion.init_args.eta", True),
    ],
)
def test_what_may_change_in_a_training(key, counts):
    trees = []
    for entry in ("this", "that"):
        for name in reversed(key.split(".")):
            entry = {name: entry}
        trees.append(entry)
    assert bool(differences(*trees, _HARMLESS)) == counts


def test_a_training_without_an_end_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match=r"got neither trainer.max_epochs nor trainer.max_steps; give one of them"):
        fit(network(), tmp_path, epochs=-1)
    assert not list(tmp_path.iterdir())


# ---- prompts and chunks of rollouts


class Confined(GaussianDiffusion):
    """A chain whose decoder runs out of memory above three rows."""

    def decode(self, x0):
        if len(x0) > 3:
            raise torch.OutOfMemoryError
        return super().decode(x0)


def test_ends_are_scored_in_chunks_that_fit(tmp_path):
    state, data, _ = train(tmp_path, 20)
    for chunk_size in ("auto", 3):
        confined, others, _ = train(tmp_path, 20, Confined(3, chunk_size=chunk_size))
        assert torch.equal(others.states[0].rewards, data.states[0].rewards)
        assert_same(confined, state)


def test_only_used_prompts_are_encoded_in_blocks(tmp_path):
    diffusion = GaussianDiffusion(3)
    prompts = [str(k / 1000) for k in range(300)]
    _, data, _ = train(tmp_path, 150, diffusion, prompts=prompts)
    assert max(len(pairs) for pairs in diffusion.encoded) == 64
    assert {text for pairs in diffusion.encoded for text, _ in pairs} == set(prompts[:150])
    assert data.states[0].prompts.flatten().tolist() == list(range(150))


def test_features_of_prompts_do_not_depend_on_the_blocks(sd15, monkeypatch):
    from svdd.diffusion.stable_diffusion import StableDiffusion
    from svdd.rewards.jpeg import Compressibility

    model, texts = ValueFitting(Compressibility(), StableDiffusion(sd15, 3), network()), list("abcde")
    model.encode_prompts(texts)
    whole = model._prompt_features
    monkeypatch.setattr("svdd.values.training.fitting._PROMPTS_PER_BLOCK", 2)
    model.encode_prompts(texts)
    torch.testing.assert_close(model._prompt_features, whole)


def test_negative_prompts_of_the_file_are_used(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,negative_prompt\n0.1,blurred\n0.2,\n")
    diffusion = GaussianDiffusion(3)
    model = ValueFitting(Linear(B), diffusion, network())
    trainer().fit(model, RolloutDataModule(str(path), 8, cache=str(tmp_path / "cache")))
    assert diffusion.encoded[0] == [("0.1", "blurred"), ("0.2", None)]


def test_one_data_module_serves_one_model_after_the_other(tmp_path):
    """The second model has its own scales, prompts and reward."""
    data, means = RolloutDataModule(["0", "1"], 8, cache=str(tmp_path)), []
    for b in (B, [2 * entry for entry in B]):
        model = ValueFitting(Linear(b), GaussianDiffusion(3), network())
        trainer().fit(model, data)
        assert model.value.trained
        means.append(float(model.value.mean))
        assert float(data.states[0].rewards[:7].mean()) == pytest.approx(0, abs=1e-5)  # in its units
    assert means[1] == pytest.approx(2 * means[0], rel=1e-5)


# ---- several trainings at a time


@pytest.fixture
def locked():
    """Locks a file in another process, until the test ends."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    processes = []

    def hold(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", code, str(path)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()

    yield hold
    for process in processes:
        process.communicate(b"\n")


def test_a_cache_locked_by_another_run_is_not_written(tmp_path, locked):
    train(tmp_path, 100)
    (folder,) = tmp_path.iterdir()
    foreign = folder / "rollouts-00002.safetensors.tmp"
    foreign.write_bytes(b"of the other run")
    locked(folder / ".lock")
    with pytest.raises(UserError, match=r"another run draws rollouts into .*; wait for it, or choose another --data.c"):
        train(tmp_path, 200)
    assert foreign.exists()
    assert train(tmp_path, 64)[2] == 0  # nothing is missing, so it is only read


def test_rollouts_drawn_meanwhile_by_another_run_are_reused(tmp_path, monkeypatch):
    train(tmp_path, 20)
    look, looks = RolloutCache.missing, []

    def missing(cache):
        looks.append(cache)
        return [0] if len(looks) == 1 else look(cache)

    monkeypatch.setattr(RolloutCache, "missing", missing)
    assert train(tmp_path, 20)[2] == 0
    assert len(looks) == 2


def test_an_output_folder_belongs_to_one_training_at_a_time(command, tmp_path, locked, monkeypatch, capsys):
    assert main(command()) == 0
    locked(tmp_path / "value" / ".lock")
    before = (tmp_path / "value" / "config.yaml").read_bytes()
    for words in ((), ("--overwrite", "true")):
        capsys.readouterr()
        assert main(command(*words)) == 2
        assert "value is in use by another run" in capsys.readouterr().err
    assert (tmp_path / "value" / "config.yaml").read_bytes() == before
    assert (tmp_path / "value" / "value.safetensors").is_file()
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # another process of the training that holds the lock
    assert main(command("--data.num_rollouts", "0")) == 2
    assert "num_rollouts must be >= 4" in capsys.readouterr().err


# ---- other prompts


class Product(Reward):
    """The prompt, a number, times the first entry of the latent."""

    def forward(self, images, prompts):
        return images[:, 0, 0, 0] * torch.tensor([float(prompt) for prompt in prompts], dtype=images.dtype)


def test_every_state_is_also_trained_on_with_another_prompt(tmp_path):
    """The second half of the training states has the reward of the same image for other prompts."""
    prompts = ("-1", "0.5", "2")
    options = {"num_rollouts": 70, "other_prompts": 4, "batch_size": 64, "epochs": 1, "prompts": prompts}
    model, data, _ = fit(network(), tmp_path, GaussianDiffusion(3), Product(), **options)
    training, held_out = data.states
    assert len(training) == 2 * 63 * 2
    assert len(held_out) == 7 * 2
    own, other = (training.__getitems__(list(part)) for part in (range(126), range(126, 252)))
    for name in ("x", "next_x", "step", "next_step"):
        assert torch.equal(own[name], other[name])
    assert (own["prompt"] != other["prompt"]).all()
    assert set(other["prompt"].tolist()) == {0, 1, 2}
    numbers = torch.tensor([float(prompt) for prompt in prompts])
    ends = torch.cat([shard["end"] for shard in training.shards])[:63, 0, 0, 0].repeat_interleave(2).float()
    for batch in (own, other):
        rewards = model.value.mean + model.value.std * batch["reward"]
        torch.testing.assert_close(rewards, ends * numbers[batch["prompt"]])
    assert torch.equal(held_out.__getitems__([0, 2])["prompt"], torch.tensor([0, 1]))  # rollouts 63 and 64


def test_other_prompts_need_two(tmp_path):
    with pytest.raises(UserError, match="other_prompts=1 needs at least two prompts, got 1"):
        RolloutDataModule(["0"], other_prompts=1)
