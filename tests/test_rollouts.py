"""Rollouts that outlive one training: more of them, fewer, for another model, and several trainings at a time."""

import torch

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
