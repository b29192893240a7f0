"""Rewards give the scores of a float32 run in every precision of the Trainer."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from svdd.__main__ import main
from svdd.assets.content import digest
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.function import FunctionReward
from svdd.rewards.pretrained import PretrainedReward
from svdd.rewards.weighted_sum import WeightedSum
from svdd.runs.prompts import PromptDataModule
from svdd.samplers.unguided import Unguided
from svdd.state.state import State
from svdd.values.feature import FeatureValue
from svdd.values.training.data import RolloutDataModule
from svdd.values.training.fitting import ValueFitting
from tests.tested_rewards import TESTED, Edges, images_of, serving

HALF, SINGLE = torch.bfloat16, torch.float32
SURROUNDINGS = {  # of a reward: default type, type of autocast if it is on, type of the weights of the network
    "32-true": (SINGLE, None, SINGLE),
    "16-mixed": (SINGLE, torch.float16, SINGLE),
    "bf16-mixed": (SINGLE, HALF, SINGLE),
    "16-true": (torch.float16, None, torch.float16),
    "bf16-true": (HALF, None, HALF),
}
known: dict[str, Any] = {}  # rewards and pictures of the list, and what a run has seen


class Watched(StableDiffusion):
    """Notes the default type and the type of its weights as it decodes."""

    def decode(self, x0: Tensor) -> Tensor:
        known["decoded"] = torch.get_default_dtype(), self.dtype
        return super().decode(x0)


class Listed(Reward):
    """All rewards of the list, which score fixed pictures while a run scores its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(k): reward for k, reward in enumerate(known["rewards"].values())})

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        known["surroundings"] = torch.get_default_dtype(), autocast, known["decoded"][1]
        return super().score(images, prompts)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        pairs = zip(known["pictures"].values(), self.parts.values(), strict=True)
        known["scores"] = [reward.score(*given) for given, reward in pairs]
        return torch.stack([reward.score(images, prompts) for reward in self.parts.values()]).mean(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with serving(tmp_path_factory.mktemp) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield found


@pytest.fixture(scope="module")
def exact(models):
    """The scores of 16 pictures outside of a Trainer, by the name of the case."""
    known["rewards"] = {name: case.make(models) for name, case in TESTED.items()}
    known["pictures"] = {name: images_of(case, 16) for name, case in TESTED.items()}
    yield {name: reward.score(*known["pictures"][name]) for name, reward in known["rewards"].items()}
    known.clear()


def run(precision: str, sd15: str, folder: Path, **model: Any) -> int:
    """Runs `svdd predict` in this process; Lightning's own 16-mixed is bf16-mixed on a CPU."""
    float16 = {"class_path": "MixedPrecision", "init_args": {"precision": "16-mixed", "device": "cpu"}}
    trainer = {"plugins": [float16]} if precision == "16-mixed" else {"precision": precision}
    diffusion = {"class_path": f"{__name__}.Watched", "init_args": {"pretrained": sd15, "num_inference_steps": 2}}
    config = {
        "model": {"diffusion": diffusion, "sampler": "Unguided", **model},
        "data": {"prompts": ["red apple"]},
        "trainer": {"accelerator": "cpu", "devices": 1, **trainer},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return main(["predict", "--config", str(folder / "config.yaml"), "--output", str(folder / "run")])


@pytest.mark.parametrize("precision", SURROUNDINGS)
def test_scores_are_those_of_float32(precision, exact, sd15, tmp_path):
    held_out = [f"{__name__}.Listed", "CLIPScore", "Compressibility"]
    assert run(precision, sd15, tmp_path, reward="tests.tested_rewards.Edges", eval_rewards=held_out) == 0
    assert known["surroundings"] == SURROUNDINGS[precision]
    assert known["decoded"][0] == SINGLE  # samplers and schedulers compute in float32
    for (name, expected), scores in zip(exact.items(), known["scores"], strict=True):
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6, msg=f"{name}: {scores}, not {expected}")
        apart = (expected[:, None] - expected).abs() > 1e-5 * expected.abs().max()
        order, expected_order = (numbers[:, None] > numbers for numbers in (scores, expected))
        assert torch.equal(order[apart], expected_order[apart]), name


def trainer(precision: str, folder: Path, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", devices=1, precision=precision, default_root_dir=folder, **quiet, **options)


def test_weights_that_a_trainer_reads_are_those_of_the_file(exact, models, sd15, tmp_path):
    """Lightning reads them where half precision is the default type of new tensors."""
    networks = {
        name: reward
        for name, case in TESTED.items()
        if isinstance(reward := case.make(models), PretrainedReward) and [*known["rewards"][name].parameters()]
    }
    guide = WeightedSum([*networks.values()])
    model = GuidedDiffusion(guide, StableDiffusion(sd15, num_inference_steps=1), Unguided())
    trainer("bf16-true", tmp_path).predict(model, PromptDataModule(["a"]))
    assert model.diffusion.dtype == torch.bfloat16
    for name, reward in networks.items():
        assert digest(reward) == digest(known["rewards"][name]), name


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_gradients_go_through_a_decoder_in_half_precision(sd15, tiny_clip, tmp_path, precision):
    """They are those of a float32 model up to the rounding of its latents, network and decoder."""
    gradients = []
    for chosen in ("32-true", precision):
        reward = WeightedSum([CLIPScore(tiny_clip), Edges()], [1.0, 0.01])
        model = GuidedDiffusion(reward, StableDiffusion(sd15, num_inference_steps=3), Unguided())
        plugin = trainer(chosen, tmp_path).precision_plugin
        with plugin.forward_context():
            state = State.start(plugin.convert_module(model).diffusion, ["panda", "red apple"], [0, 1]).propose()
            values, gradient = state.gradient(model.value)
        assert values.dtype == torch.float32
        gradients.append(gradient.float().flatten(1))
    assert torch.cosine_similarity(*gradients).min() > 0.95


def test_a_value_is_fitted_in_half_precision(sd15, tiny_clip, tmp_path):
    """Rewards of 100 that differ by hundredths would be equal in bfloat16."""
    reward = FunctionReward(lambda images, prompts: 100 + images.mean((1, 2, 3)) / 10)
    value = FeatureValue(tiny_clip, width=8)
    model = ValueFitting(reward, StableDiffusion(sd15, num_inference_steps=2), value)
    data = RolloutDataModule(["panda", "red apple"], 12, cache=str(tmp_path))
    fitting = trainer("bf16-true", tmp_path, max_epochs=1, num_sanity_val_steps=0)
    fitting.fit(model, data)
    assert {parameter.dtype for parameter in value.network.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in (value.mean, value.std, value.spread, value.units.running_mean)} == {SINGLE}
    assert 100 < value.mean < 100.1
    assert 0 < value.std < 0.1
    assert len(data.states[0].rewards.unique()) == 12
    assert fitting.callback_metrics["val_loss"].isfinite()
