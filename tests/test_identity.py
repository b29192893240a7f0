"""The identity of a learned value: all settings that its estimates depend on are compared."""

import json
import shutil
import sys

import lightning as L
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from svdd import UserError
from svdd.diffusion.pipelines import fingerprint
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.function import FunctionReward
from svdd.rewards.image_reward import ImageReward
from svdd.rewards.jpeg import Compressibility
from svdd.rewards.pick_score import PickScore
from svdd.rewards.threshold import Threshold
from svdd.rewards.vlm_judge import VLMJudge
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.z_scored import ZScored
from svdd.runs.folder import RunFolder
from svdd.runs.prompts import PromptDataModule
from svdd.runs.writer import RunError, RunWriter
from svdd.samplers.unguided import Unguided
from svdd.values.feature import FeatureValue
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import to_safetensors

SUM = WeightedSum([Compressibility(), Brightness()], [1.0, 0.1])


class Counting(Reward):
    """A user's reward with one setting, and with attributes that are not settings."""

    def __init__(self, strength=1.0, table=None):
        super().__init__()
        self.strength, self.table, self.calls = strength, torch.ones(3), 0

    def forward(self, images, prompts):
        self.calls += 1
        return images.mean((1, 2, 3)) * self.strength


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SUM, WeightedSum([Compressibility(), Brightness()], [1.0, 0.2])),
        (SUM, WeightedSum([Brightness(), Compressibility()], [1.0, 0.1])),
        (Threshold(Brightness(), 0.2), Threshold(Brightness(), at_most=0.2)),
        (Threshold(Brightness(), 0.2), Threshold(Compressibility(), 0.2)),
        (ZScored(Brightness(), 0, 1), ZScored(Brightness(), 0, 2)),
        (CLIPScore("emoji"), CLIPScore("emoji-judge")),
        (PickScore(revision="a"), PickScore(revision="b")),
        (PickScore(), PickScore(revision="a")),
        (FunctionReward("math.sin"), FunctionReward("math.cos")),
        (VLMJudge(endpoint="http://localhost/v1", model="a"), VLMJudge(endpoint="http://localhost/v1", model="b")),
        (VLMJudge(question="Is it {prompt}?"), VLMJudge(question="Is it not {prompt}?")),
        (Counting(1.0), Counting(2.0)),
        (Brightness(), Compressibility()),
    ],
    ids=lambda reward: reward.name,
)
def test_rewards_of_other_settings_are_other_rewards(one, other):
    assert json.loads(json.dumps(one.identity)) == one.identity
    assert one.identity != other.identity


def test_attributes_that_change_no_score_are_ignored():
    reward = Counting()
    before = reward.identity
    reward(torch.ones(1, 3, 2, 2), [""])
    assert reward.identity == before == {"name": "Counting", "strength": 1.0}
    assert VLMJudge(batch_size=2).identity == VLMJudge(batch_size=4).identity
    assert Compressibility().identity == "Compressibility"


def test_a_folder_may_be_moved(tmp_path, tiny_clip):
    moved = shutil.copytree(tiny_clip, tmp_path / tiny_clip.rsplit("/", 1)[-1])
    assert CLIPScore(str(moved)).identity == CLIPScore(tiny_clip).identity


def test_a_value_of_one_sum_is_refused_by_another(sd15, tmp_path):
    path = tmp_path / "value.safetensors"
    diffusion = StableDiffusion(sd15, 2)
    path.write_bytes(to_safetensors(GuidedDiffusion(SUM, diffusion, value=LatentConvValue(8, 1)).value.checkpoint()))
    GuidedDiffusion(SUM, diffusion, value=LatentConvValue(8, 1, pretrained=str(path)))
    other = WeightedSum([Compressibility(), Brightness()])
    with pytest.raises(UserError, match=r"reward was .*\[1.0, 0.1\].*, here it is .*\[1.0, 1.0\]"):
        GuidedDiffusion(other, diffusion, value=LatentConvValue(8, 1, pretrained=str(path)))


def test_a_value_on_features_belongs_to_what_it_reads(sd15, tiny_clip, tmp_path):
    path, diffusion = tmp_path / "value.safetensors", StableDiffusion(sd15, 2)
    value = FeatureValue(tiny_clip, decode_from="x", width=8)
    path.write_bytes(to_safetensors(GuidedDiffusion(Brightness(), diffusion, value=value).value.checkpoint()))
    with pytest.raises(UserError, match="reward was 'Brightness', here it is 'Compressibility'"):
        GuidedDiffusion(Compressibility(), diffusion, value=FeatureValue(tiny_clip, pretrained=str(path)))
    other = shutil.copytree(tiny_clip, tmp_path / "other-clip")
    with pytest.raises(UserError, match=r"clip was .*, here it is .*other-clip"):
        GuidedDiffusion(Brightness(), diffusion, value=FeatureValue(str(other), width=8, pretrained=str(path)))


def test_models_of_one_name_are_distinguished_by_their_weights(sd15, tmp_path):
    """Another fine-tune in a folder of the same name does not reuse the first one's rollouts."""
    name = sd15.rsplit("/", 1)[-1]
    same, tuned, half = (tmp_path / kind / name for kind in ("same", "tuned", "half"))
    shutil.copytree(sd15, same)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter *= 1.01
    pipeline.save_pretrained(tuned)
    StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None).to(torch.float16).save_pretrained(half)
    identity = StableDiffusion(sd15, 2).identity
    assert StableDiffusion(str(same), 2).identity == identity == StableDiffusion(str(half), 2).identity
    different = StableDiffusion(str(tuned), 2).identity
    assert {key for key in identity if identity[key] != different[key]} == {"weights"}


def test_the_tokenizer_belongs_to_image_reward():
    assert ImageReward(tokenizer="a").identity != ImageReward(tokenizer="b").identity


def scale(file, suffix=""):
    """Multiplies one tensor of a weights file."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(suffix) and tensors[name].is_floating_point())
    save_file(tensors | {name: tensors[name] * 1.5}, file, {"format": "pt"})


def edit_json(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


CHANGES = {
    "diffusion.unet": lambda path: scale(path / "sd/unet/diffusion_pytorch_model.safetensors", "bias"),
    "diffusion.vae": lambda path: scale(path / "sd/vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    "diffusion.text_encoder": lambda path: scale(path / "sd/text_encoder/model.safetensors", "token_embedding.weight"),
    "diffusion.configuration": lambda path: edit_json(path / "sd/scheduler/scheduler_config.json", beta_end=0.013),
    "diffusion.configuration ": lambda path: edit_json(
        path / "sd/tokenizer/tokenizer_config.json", padding_side="left"
    ),
    "reward CLIPScore-clip": lambda path: scale(path / "clip/model.safetensors", "visual_projection.weight"),
    "reward CLIPScore-clip ": lambda path: edit_json(path / "clip/preprocessor_config.json", image_mean=[0.4] * 3),
    "reward ZScored-Brightness": lambda path: edit_json(
        path / "summary.json", rewards={"Brightness": STATISTICS | {"std": 2}}
    ),
    "the code of reward_of_mine": lambda path: (path / "reward_of_mine.py").open("a").write("# changed\n"),
    "the code of helper_of_mine": lambda path: (path / "helper_of_mine.py").open("a").write("WEIGHT = 2.0\n"),
    "the code of late_of_mine": lambda path: (path / "late_of_mine.py").open("a").write("SHIFT = 1.0\n"),
}
STATISTICS = {"mean": 0.0, "std": 1.0, "std_within": None}
WIDER = STATISTICS | {"std": 2.0}


@pytest.fixture
def mine(sd15, tiny_clip, tmp_path, monkeypatch):
    """A folder of copies whose files may be changed: a diffusion model, a CLIP, statistics, and a reward's modules."""
    shutil.copytree(sd15, tmp_path / "sd")
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "summary.json").write_text(json.dumps({"rewards": {"Brightness": STATISTICS}}))
    (tmp_path / "helper_of_mine.py").write_text("WEIGHT = 1.0\n")
    (tmp_path / "late_of_mine.py").write_text("SHIFT = 0.0\n")
    function = "def score(images, prompts):\n    from late_of_mine import SHIFT\n\n"
    function += "    return images.mean((1, 2, 3)) * WEIGHT + SHIFT\n"
    (tmp_path / "reward_of_mine.py").write_text(f"from helper_of_mine import WEIGHT\n\n{function}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load(mine):
    for module in ("reward_of_mine", "helper_of_mine", "late_of_mine"):
        sys.modules.pop(module, None)
    rewards = [CLIPScore(str(mine / "clip")), ZScored(Brightness(), statistics=str(mine))]
    rewards.append(FunctionReward("reward_of_mine.score"))
    return GuidedDiffusion(Brightness(), StableDiffusion(str(mine / "sd"), 2), Unguided(), eval_rewards=rewards)


@pytest.fixture(scope="module")
def unchanged():
    """The fingerprints of the copies before a change, once known: they do not depend on the folder."""
    return {}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprints_name_what_has_changed(mine, name, unchanged):
    before = unchanged or unchanged.update(load(mine).fingerprints()) or unchanged
    CHANGES[name](mine)
    after = load(mine).fingerprints()
    assert {part for part in before if before[part] != after[part]} == {name.strip()}
    assert after.keys() == before.keys()


def test_a_run_does_not_continue_with_other_weights(mine):
    """New weights under the same path would make one run of two models."""

    def draw():
        writer, data = RunWriter(mine / "run", {"label": "same"}), PromptDataModule(["apple", "car"], batch_size=1)
        data.skip(finished := writer.open())
        trainer = L.Trainer(callbacks=[writer], accelerator="cpu", logger=False, enable_checkpointing=False, **QUIET)
        trainer.predict(load(mine), data, return_predictions=False)
        return finished

    assert draw() == set()
    results = mine / "run" / "results.jsonl"
    first = results.read_bytes().splitlines(keepends=True)[0]
    results.write_bytes(first)
    assert draw() == {0}  # nothing has changed
    results.write_bytes(first)
    CHANGES["diffusion.unet"](mine)
    with pytest.raises(RunError, match=r"run was begun with other contents of diffusion\.unet: restore what was there"):
        draw()
    assert results.read_bytes() == first


QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def test_a_changed_library_is_a_warning(tmp_path, capsys):
    record = tmp_path / "fingerprints.json"
    folder = RunFolder(tmp_path)
    assert folder.fingerprint({"value": "a"}, {"torch": "1.0"}) == []
    assert folder.fingerprint({"value": "a"}, {"torch": "2.0"}) == ["torch 1.0, now 2.0"]
    with pytest.raises(RunError, match=r"begun with other contents of value; torch 1\.0, now 2\.0: restore"):
        folder.fingerprint({"value": "b"}, {"torch": "2.0"})
    record.write_bytes(bytes(20))  # as if it had been removed
    assert folder.fingerprint({"value": "b"}, {"torch": "1.0"}) == []


def test_the_negative_prompt_belongs_to_the_chain(sd15):
    assert StableDiffusion(sd15, 2, negative_prompt="apple").identity != StableDiffusion(sd15, 2).identity


def test_a_fingerprint_covers_every_parameter():
    network = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 1))
    seen = {fingerprint(network)}
    for parameter in network.parameters():
        with torch.no_grad():
            parameter += 0.1
        seen.add(fingerprint(network))
    assert len(seen) == 5


def test_an_argument_may_be_any_text(tmp_path):
    for text in ("a word " * 100, "~ how good?", "~who/ is it", "a\0b", "a" * 5000, str(tmp_path / "x")):
        assert VLMJudge(question=text).identity["question"] == text
    assert VLMJudge(question=str(tmp_path)).identity["question"] == tmp_path.name


def test_a_label_tells_rewards_of_one_class_apart():
    first, second = VLMJudge(), VLMJudge(question="Is it good?", label="good")
    assert (first.name, second.name) == ("VLMJudge", "VLMJudge-good")
    assert "label" not in first.identity
    assert [*GuidedDiffusion(first, eval_rewards=[second]).rewards] == ["VLMJudge", "VLMJudge-good"]
