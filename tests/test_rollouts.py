"""Rollouts that outlive one training: more of them, fewer, for another model, and several trainings at a time."""

import pytest
import torch
import yaml

from svdd.__main__ import main
from svdd.commands.fit import _HARMLESS
from svdd.errors import UserError
from svdd.run_config import differences
from tests.analytic import GaussianDiffusion
from tests.test_learned_values import fit, network


def train(cache, num_rollouts, diffusion=None, **options):
    """A short training; returns the value's weights, the data and the drawn denoiser rows."""
    diffusion = diffusion or GaussianDiffusion(3)
    options = {"epochs": 1, "batch_size": 64, **options}
    model, data, _ = fit(network(), cache, diffusion, num_rollouts=num_rollouts, **options)
    return model.value.state_dict(), data, sum(diffusion.denoised_rows)


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


# ---- the number of rollouts


def test_the_number_of_rollouts_may_change(tmp_path):
    """Only what a shorter cache lacks is drawn, and the values are those of caches of their own."""
    fresh = {count: train(tmp_path / str(count), count, prompts=("0", "1"))[0] for count in (100, 101, 200)}
    for count, rows in ((100, 100 * 3), (200, (64 + 64 + 8) * 3), (100, 0), (101, 0), (200, 0)):
        state, data, drawn = train(tmp_path / "one", count, prompts=("0", "1"))
        assert drawn == rows, count
        assert sum(len(shard["end"]) for shard in data.training.shards) == count
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


# ---- what a training goes on with


@pytest.fixture
def command(sd15, prompts_file, tmp_path):
    """Returns `svdd fit` on a tiny model, with further arguments."""
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


def test_a_training_goes_on_only_with_the_prompts_and_settings_it_began_with(command, prompts_file, tmp_path, capsys):
    failing = command("--data.batch_size", "4", "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00")
    assert main(failing) == 2  # before the first checkpoint: it binds nobody
    assert main(command()) == 0
    capsys.readouterr()
    assert main(command("--data.batch_size", "4", "--trainer.gradient_clip_val", "1")) == 2
    message = capsys.readouterr().err
    assert "data.batch_size was 8, now 4" in message
    assert "trainer.gradient_clip_val was None, now 1" in message
    prompts_file.write_text(prompts_file.read_text().replace("panda", "pandas"))
    assert main(command("--trainer.max_epochs", "2")) == 2
    assert "data.prompts_sha256 was" in capsys.readouterr().err
    prompts_file.write_text(prompts_file.read_text().replace("pandas", "panda"))
    assert main(command("--trainer.max_epochs", "2", "--data.rollout_batch_size", "3")) == 0
    assert torch.load(tmp_path / "value" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


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
        ("data.cache", False),
        ("data.rollout_batch_size", False),
        ("data.batch_size", True),
        ("data.num_rollouts", True),
        ("data.prompts_sha256", True),
        ("seed_everything", True),
        ("model.sampler", False),
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
