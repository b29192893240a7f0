"""Learned values against closed forms, their rollouts and their checkpoints."""

import json
import math
import warnings
from operator import attrgetter

import lightning as L
import pytest
import safetensors
import safetensors.torch
import torch

from svdd import UserError
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.runs.rows import Prompt
from svdd.samplers.dps import DPS
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.state import State
from svdd.values.feature import FeatureValue
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import to_safetensors
from svdd.values.losses import MeanLoss, SoftLoss
from svdd.values.pretrained import load_value
from svdd.values.training.data import RolloutDataModule
from svdd.values.training.fitting import ValueFitting
from svdd.values.training.rollouts import RolloutCache, draw_rollouts
from tests.analytic import ExactSoftValue, GaussianDiffusion, Linear, bound, run

B = [0.6, -0.8]
ALPHA = 0.5


def fit(value, cache, diffusion=None, reward=None, epochs=8, prompts=("0",), **options):
    """Trains a value as the command line does, without an output folder."""
    model = ValueFitting(reward or Linear(B), diffusion or GaussianDiffusion(4), value)
    defaults = {"num_rollouts": 4096, "batch_size": 512, "rollout_batch_size": 2048, "cache": str(cache)}
    data = RolloutDataModule(list(prompts), **defaults | options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data)
    model.eval()
    return model, data, trainer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Rollouts of the Gaussian chain, shared by all values here."""
    return tmp_path_factory.mktemp("rollouts")


def network(**options):
    return LatentConvValue(channels=32, num_blocks=1, dropout=0.0, learning_rate=5e-3, **options)


# ---- convergence to the known value


@pytest.mark.parametrize(
    ("loss", "soft"),
    [
        (MeanLoss(), False),
        (MeanLoss(bootstrap=True), False),
        (SoftLoss(ALPHA), True),
        (SoftLoss(ALPHA, bootstrap=True), True),
    ],
    ids=["mean", "mean, bootstrapped", "soft", "soft, bootstrapped"],
)
def test_a_learned_value_converges_to_the_known_one(cache, loss, soft):
    """The mean loss learns E[r | x_i] = b . (A x + c), the soft loss that plus V / (2 alpha)."""
    diffusion = GaussianDiffusion(4)
    model, _, _ = fit(network(loss=loss), cache, diffusion, epochs=10)
    state = State.start(diffusion, [""] * 400, range(400))
    exact = bound(ExactSoftValue(ALPHA), Linear(B))
    with torch.no_grad():
        for i in range(1, 4):
            state = state.propose()
            bonus = diffusion.end(i)[2] / (2 * ALPHA)  # soft value minus mean
            truth = exact(state) - (0 if soft else bonus)
            learned = model.value(state).double()
            assert float((learned - truth).square().mean() / truth.var()) < 0.06
            assert abs(float((learned - truth).mean())) < 0.25 * diffusion.end(1)[2] / (2 * ALPHA)


def test_the_soft_loss_is_minimal_at_the_soft_value():
    rewards, alpha, scale = torch.tensor([0.0, 1.0, 1.0, 4.0], dtype=torch.float64), 2.0, 3.0
    target = alpha * math.log(float((rewards / alpha).exp().mean()))
    v = torch.full((4,), target / scale, dtype=torch.float64, requires_grad=True)
    loss = SoftLoss(alpha)(v, rewards / scale, scale)
    assert float(torch.autograd.grad(loss, v)[0].sum()) == pytest.approx(0, abs=1e-12)
    for nearby in (-0.05, 0.05):
        assert SoftLoss(alpha)(v + nearby, rewards / scale, scale) > loss


def test_the_soft_loss_is_the_square_at_high_temperature_and_stays_finite_at_low():
    values, targets = torch.tensor([0.1, -0.4, 2.0]), torch.tensor([0.3, 0.2, -1.0])
    square = MeanLoss()(values, targets, 1.0)
    torch.testing.assert_close(SoftLoss(1e3)(values.double(), targets.double(), 1.0).float(), square, rtol=1e-2, atol=0)
    v = torch.zeros(3, requires_grad=True)
    loss = SoftLoss(1e-3)(v, torch.tensor([1e4, 0.0, -1e4]), 1.0)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, v)[0]).all()
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        SoftLoss(0)


# ---- cost and guidance


@pytest.fixture(scope="module")
def trained(cache):
    return fit(network(), cache)[0]


@pytest.mark.parametrize(("candidates", "particles"), [(20, 1), (5, 3)])
def test_svdd_with_a_learned_value_costs_t_rows(trained, candidates, particles):
    diffusion = GaussianDiffusion(4)
    final = run(diffusion, SVDD(candidates, num_particles=particles), trained.value, 3)
    ledger = final.context.ledger
    assert ledger.denoiser_rows == sum(diffusion.denoised_rows) == 3 * particles * 4
    assert ledger.decoded_images == ledger.reward_calls == 3 * particles * candidates  # of the last selection


def test_it_guides_and_its_gradient_too(trained):
    diffusion, reward = GaussianDiffusion(4), Linear(B)
    means = [
        float(run(diffusion, sampler, trained.value, 300).scores(reward).mean())
        for sampler in (Unguided(), SVDD(10), DPS(1.0))
    ]
    assert means[1] > means[0] + 0.5
    assert means[2] > means[0] + 0.2


def test_a_value_is_the_reward_at_the_end(trained):
    final = run(GaussianDiffusion(4), Unguided(), trained.value, 5)
    assert torch.equal(trained.value(final), final.scores(Linear(B)))


def test_latents_with_frames_are_read_and_latents_without_an_area_are_refused(tmp_path):
    shape, options = (2, 3, 2, 4), {"num_rollouts": 64, "batch_size": 32, "rollout_batch_size": 64}
    diffusion, reward = GaussianDiffusion(3, shape=shape), Linear([0.1] * 48)
    value = fit(network(mirror=True), tmp_path, diffusion, reward, epochs=1, **options)[0].value
    final = run(diffusion, SVDD(4, num_particles=2), value, 3)
    assert final.x.shape == (3, *shape)
    assert final.context.ledger.per_image(3)["denoiser_rows"] == 2 * 3
    with pytest.raises(
        UserError, match=r"latents of shape \[channels, height, width\], .* has latents of shape \[3, 4\]"
    ):
        network().bind(reward, GaussianDiffusion(3, shape=(3, 4)))


def test_estimates_do_not_depend_on_other_rows(trained):
    state = State.start(GaussianDiffusion(4), [""] * 6, range(6)).propose().propose()
    with torch.no_grad():
        whole = trained.value(state)
        for k in range(6):
            alone = State.start(GaussianDiffusion(4), [""], [k]).propose().propose()
            torch.testing.assert_close(trained.value(alone)[0], whole[k], rtol=1e-5, atol=1e-6)


def test_an_untrained_value_has_an_actionable_error():
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(3), SVDD(2), network())
    with pytest.raises(UserError, match=r"LatentConvValue is not trained yet: run `svdd fit` first"):
        model.sample([""])


def test_a_diverged_training_is_an_error(trained):
    broken = network()
    model = GuidedDiffusion(Linear(B), GaussianDiffusion(4), SVDD(2), broken)
    broken.load_checkpoint(trained.value.checkpoint(), "here")
    next(broken.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="LatentConvValue returned NaN or infinity at step 1: its training may have"):
        model.sample([""])


@pytest.mark.parametrize("use_prompt", [True, False])
def test_the_prompt_is_an_input_only_with_use_prompt(sd15, tmp_path, use_prompt):
    from svdd.diffusion.stable_diffusion import StableDiffusion
    from svdd.rewards.jpeg import Compressibility

    prompts, diffusion = ["red apple", "panda"], StableDiffusion(sd15, 3)
    options = {"num_rollouts": 8, "batch_size": 8}
    value = network(use_prompt=use_prompt)
    fit(value, tmp_path, diffusion, Compressibility(), 1, prompts, **options)
    state = State.start(diffusion, prompts, [0, 0]).propose()
    text = diffusion.prompt_features(state.context.conditioning)
    with torch.no_grad():
        if use_prompt:
            torch.nn.init.normal_(value.text.weight)  # initialised to 0
        apple, panda = value.predict(state.x[:1].expand(2, -1, -1, -1), torch.ones(2, dtype=torch.int64), text)
    assert (apple != panda) == use_prompt


@pytest.mark.parametrize("decode_from", ["x", "x0"])
def test_a_value_on_clip_features_learns_at_the_stated_cost(sd15, tiny_clip, tmp_path, decode_from):
    from svdd.diffusion.stable_diffusion import StableDiffusion
    from svdd.rewards.jpeg import Compressibility

    value = FeatureValue(tiny_clip, decode_from=decode_from, width=16)
    diffusion, reward = StableDiffusion(sd15, 3), Compressibility()
    fit(value, tmp_path, diffusion, reward, 2, ["panda"], num_rollouts=16, batch_size=16)
    names = set(value.checkpoint()["state_dict"])
    assert not any(name.startswith("value.clip.") for name in names)
    assert {"value.network.0.weight", "value.mean", "value.std", "value.trained"} <= names
    path = tmp_path / "value.safetensors"
    path.write_bytes(to_safetensors(value.checkpoint()))
    model = GuidedDiffusion(reward, diffusion, SVDD(4), load_value(str(path)))
    ledger = model.draw(["panda"], [0]).context.ledger
    assert ledger.denoiser_rows == (1 + 4 * 2 if decode_from == "x0" else 3)
    assert ledger.decoded_images == 4 * 2 + 4  # candidates at two steps by the value, and the ends by the reward


# ---- rollouts


def prompts(*texts):
    return [Prompt(k, text, None, None, {}) for k, text in enumerate(texts)]


def test_rollouts_are_plain_chains():
    diffusion = GaussianDiffusion(4)
    x, end = draw_rollouts(diffusion, prompts("", "1"), [5, 6], [1, 3], attrgetter("x"))
    state, kept = State.start(diffusion, ["", "1"], [5, 6]), []
    while not state.done:
        kept.append(state)
        state = state.propose()
    assert torch.equal(x, torch.stack([kept[1].x, kept[3].x], 1))
    assert torch.equal(end.x, state.x)
    x0, _ = draw_rollouts(diffusion, prompts("", "1"), [5, 6], [2], attrgetter("x0"))
    assert torch.equal(x0[:, 0], kept[2].x0)


@pytest.fixture
def filled(tmp_path):
    diffusion = GaussianDiffusion(3)
    cache = RolloutCache(tmp_path, {"steps": [1, 2]}, 150)
    cache.path.mkdir()
    for k, part in enumerate(cache.shards):
        x, end = draw_rollouts(diffusion, prompts(*[""] * len(part)), list(part), [1, 2], attrgetter("x"))
        cache.write(k, {"x": x, "end": end.x})
    return cache


def test_a_complete_cache_has_no_missing_shards(filled):
    assert [len(part) for part in filled.shards] == [64, 64, 22]
    assert filled.missing() == []
    assert [tuple(shard["x"].shape) for shard in filled.load()] == [
        (64, 2, 1, 1, 2),
        (64, 2, 1, 1, 2),
        (22, 2, 1, 1, 2),
    ]
    with safetensors.safe_open(filled.path / "rollouts-00000.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rollouts"])["settings"] == {"steps": [1, 2]}


def test_a_torn_shard_is_found(filled):
    path = filled.path / "rollouts-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert filled.missing() == [1]
    path.write_bytes(b"")
    assert filled.missing() == [1]
    path.unlink()
    assert filled.missing() == [1]
    path.write_bytes(whole)
    assert filled.missing() == []


def test_a_flipped_bit_is_found(filled):
    path = filled.path / "rollouts-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert filled.missing() == [2]


def test_other_settings_have_a_separate_folder(tmp_path, filled):
    other = RolloutCache(tmp_path, {"steps": [2]}, 150)
    assert other.path != filled.path
    assert other.missing() == [0, 1, 2]


def test_validation_targets_are_rewards_even_when_training_bootstraps(cache):
    """An untrained value fits its own bootstrapped targets, so these cannot rank checkpoints."""
    model, data, _ = fit(network(loss=MeanLoss(bootstrap=True)), cache, epochs=1, num_rollouts=256)
    batch = data.states[1].__getitems__(range(len(data.states[1])))
    with torch.no_grad():
        estimates = model.value.predict(batch["x"], batch["step"])
        held_out = float(model._loss(batch, bootstrap=False)[0])
    assert held_out == pytest.approx(float((estimates - batch["reward"]).square().mean()), rel=1e-5)
    logged = float(model.trainer.callback_metrics["val_loss"])
    assert logged == pytest.approx(held_out, rel=1e-3)


def test_only_missing_shards_are_drawn_again_and_are_identical(tmp_path):
    options = {"epochs": 1, "num_rollouts": 200, "batch_size": 64}
    diffusion = GaussianDiffusion(4)
    fit(network(), tmp_path, diffusion, **options)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    drawn = sum(diffusion.denoised_rows)
    assert drawn == 200 * 4
    fit(network(), tmp_path, diffusion, **options)
    assert sum(diffusion.denoised_rows) == drawn  # nothing was missing
    (folder / "rollouts-00003.safetensors").write_bytes(b"torn")
    (folder / "rollouts-00001.safetensors.tmp").write_bytes(b"half")
    fit(network(), tmp_path, diffusion, **options)
    assert sum(diffusion.denoised_rows) == drawn + 8 * 4  # the last shard has 8 rollouts
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_batches_pair_each_state_with_the_next(tmp_path):
    model, data, _ = fit(network(), tmp_path, epochs=1, num_rollouts=100, batch_size=64, prompts=("0", "1", "2"))
    batch = data.states[1].__getitems__(range(len(data.states[1])))
    assert len(data.states[1]) == 10 * 3
    assert len(data.states[0]) == 90 * 3
    assert batch["step"].tolist() == [1, 2, 3] * 10
    assert batch["next_step"].tolist() == [2, 3, -1] * 10
    assert batch["prompt"].tolist() == [r % 3 for r in range(90, 100) for _ in range(3)]
    inner = batch["next_step"] > 0
    assert torch.equal(batch["next_x"][inner], batch["x"][batch["step"] > 1])
    ends = torch.cat([shard["end"] for shard in data.states[1].shards])[90:]
    rewards = model.value.mean + model.value.std * batch["reward"][~inner]
    torch.testing.assert_close(rewards.double(), ends.flatten(1) @ torch.tensor(B, dtype=torch.float64))
    single = data.states[1].__getitems__([4])
    assert torch.equal(single["x"], batch["x"][4:5])


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rollouts": 0}, "num_rollouts must be >= 4"),
        ({"keep_every": 0}, "keep_every must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"validation": 1.0}, "validation must lie between 0 and 1, got 1.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_rollout_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutDataModule(["a"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be >= 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"num_blocks": 0}, "num_blocks must be >= 1, got 0"),
        ({"learning_rate": 0}, "learning_rate must be > 0, got 0"),
        ({"dropout": "0.1"}, r"dropout must be a number, got '0.1' \(str\)"),
        ({"learning_rate": "1e-3"}, r"learning_rate must be a number, got '1e-3' \(str\)"),
    ],
)
def test_network_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LatentConvValue(**options)


class Constant(Reward):
    """A constant reward."""

    def forward(self, images, prompts):
        return torch.ones(len(images))


class Broken(Reward):
    """A reward that is NaN for some images."""

    def forward(self, images, prompts):
        return torch.where(images[:, 0, 0, 0] > 0, torch.nan, 1.0)


def test_data_without_a_signal_is_refused(tmp_path, cache):
    with pytest.raises(UserError, match=r"the rewards of .* rollouts do not differ: use more, or another reward"):
        fit(network(), cache, reward=Constant())
    with pytest.raises(UserError, match="reward Broken returned NaN or infinity for"):
        fit(network(), cache, reward=Broken())
    with pytest.raises(UserError, match=r"loss.bootstrap needs every step of the rollouts, got data.keep_every=2"):
        fit(network(loss=MeanLoss(bootstrap=True)), tmp_path, keep_every=2)
    with pytest.raises(UserError, match="num_inference_steps=1 has no step between noise and image"):
        fit(network(), tmp_path, GaussianDiffusion(1))


# ---- weights on disk


def test_exported_weights_come_back(trained, tmp_path):
    path = tmp_path / "value.safetensors"
    path.write_bytes(to_safetensors(trained.value.checkpoint()))
    checkpoint = {"state_dict": {}}
    trained.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    state = State.start(GaussianDiffusion(4), [""] * 5, range(5)).propose().propose()
    for value, tolerance in (
        (load_value(str(path)), 1e-2),  # half precision
        (LatentConvValue(pretrained=str(path)), 1e-2),
        (LatentConvValue(dropout=0.5, pretrained=str(path)), 1e-2),
        (load_value(str(tmp_path / "best.ckpt")), 0),
    ):
        value.bind(Linear(B), GaussianDiffusion(4))
        value.eval()
        assert (value.channels, value.num_blocks) == (32, 1)
        with torch.no_grad():
            torch.testing.assert_close(value(state), trained.value(state), rtol=tolerance, atol=tolerance)


def test_a_trained_value_keeps_its_weights_when_bound_again(cache):
    value = fit(network(), cache, epochs=1, num_rollouts=64)[0].value
    state = State.start(GaussianDiffusion(4), [""] * 5, range(5)).propose()
    before = value(state)
    GuidedDiffusion(Linear(B), GaussianDiffusion(4), SVDD(2), value)
    value.eval()
    assert torch.equal(value(state), before)
    with pytest.raises(UserError, match="this value was trained for something else: num_inference_steps was 4, here"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(5), SVDD(2), value)


def test_a_custom_class_is_found_by_its_import_path(trained, tmp_path):
    path, checkpoint = tmp_path / "value.safetensors", trained.value.checkpoint()
    checkpoint["svdd_value"]["identity"] = trained.value.identity | {"value": "Mine"}
    path.write_bytes(to_safetensors(checkpoint))
    with pytest.raises(UserError, match=r"holds a value of class 'Mine', which is not imported; name the class"):
        load_value(str(path))

    class Mine(LatentConvValue):
        """Has its own arguments, one of which is not plain data."""

        def __init__(self, channels=16, layer=torch.nn.Identity, pretrained=None):
            super().__init__(channels, 1, pretrained=pretrained)
            self.layer = layer

    value = load_value(str(path))
    value.bind(Linear(B), GaussianDiffusion(4))
    assert type(value) is Mine
    assert value.arguments == {"channels": 32}


@pytest.mark.parametrize(
    ("reward", "diffusion", "difference"),
    [
        (Constant(), GaussianDiffusion(4), "reward was 'Linear', here it is 'Constant'"),
        (Linear(B), GaussianDiffusion(5), "num_inference_steps was 4, here it is 5"),
        (
            Linear([1.0, 0.0, 0.0]),
            GaussianDiffusion(4, size=3),
            r"latent_shape was \[1, 1, 2\], here it is \[1, 1, 3\]",
        ),
    ],
)
def test_weights_for_something_else_are_refused(trained, tmp_path, reward, diffusion, difference):
    path = tmp_path / "value.safetensors"
    path.write_bytes(to_safetensors(trained.value.checkpoint()))
    with pytest.raises(UserError, match=f"was trained for something else: .*{difference}"):
        GuidedDiffusion(reward, diffusion, value=network(pretrained=str(path)))
    checkpoint = {"state_dict": {}}
    trained.on_save_checkpoint(checkpoint)
    with pytest.raises(UserError, match=f"the checkpoint was trained for something else: .*{difference}"):
        ValueFitting(reward, diffusion, network()).on_load_checkpoint(checkpoint)


def test_weights_of_another_size_and_missing_weights_are_refused(trained, tmp_path):
    path = tmp_path / "value.safetensors"
    path.write_bytes(to_safetensors(trained.value.checkpoint()))
    larger = LatentConvValue(channels=64, pretrained=str(path))
    with pytest.raises(UserError, match=r"does not fit LatentConvValue: channels was 32, here it is 64"):
        GuidedDiffusion(Linear(B), GaussianDiffusion(4), value=larger)
    whole, foreign = path.read_bytes(), safetensors.torch.save({"x": torch.ones(2)})
    for data, message in ((whole[:100], "not a weights file, or a damaged one"), (foreign, "holds no value of svdd")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{message}; expected value.safetensors, best.ckpt or last.ckpt"):
            GuidedDiffusion(Linear(B), GaussianDiffusion(4), value=network(pretrained=str(path)))
    with pytest.raises(UserError, match=r"cannot be read: No such file or directory; expected value.safetensors"):
        load_value(str(tmp_path / "none.safetensors"))


def test_a_checkpoint_holds_the_value_alone(trained):
    checkpoint = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"value"}
    assert checkpoint["svdd_value"] == {
        "identity": {
            "value": "LatentConvValue",
            "input": "x",
            "reward": "Linear",
            "diffusion": "GaussianDiffusion",
            "num_inference_steps": 4,
            "latent_shape": [1, 1, 2],
        },
        "arguments": {"channels": 32, "num_blocks": 1, "use_prompt": True, "dropout": 0.0, "mirror": False},
    }
    with pytest.raises(UserError, match=r"holds no value of svdd; expected value.safetensors, best.ckpt or last.ckpt"):
        trained.on_load_checkpoint({"state_dict": {}})
