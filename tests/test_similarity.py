"""Similarity to a reference picture: parity with plain computations, caching, and pictures that cannot be read."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from transformers import AutoModel, BitImageProcessor, CLIPImageProcessor, CLIPModel

from svdd import RewardError, UserError
from svdd.assets.hub import ASSETS
from svdd.rewards.columns import PromptText
from svdd.rewards.similarity import Similarity
from tests.tested_rewards import as_pil, pictures
from tests.tiny_reward_models import save_alexnet, save_tiny_dinov2


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A random DINOv2 with its processor, and random weights of AlexNet's convolutions, as torchvision names them."""
    places = [tmp_path_factory.mktemp(name) for name in ("dinov2", "lpips")]
    return {"dinov2": save_tiny_dinov2(places[0]), "lpips": save_alexnet(places[1]), "clip": "emoji"}


def plain(features: str, pretrained: str, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """The same number without svdd."""
    both = torch.cat([images, references])
    if features == "lpips":
        net = torchvision.models.alexnet().features.eval()
        net.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(pretrained).items()})
        weights = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
        linear, total = torch.load(weights, map_location="cpu"), torch.zeros(len(images))
        shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        x = (2 * both - 1 - shift) / scale
        for k, layer in enumerate(net):
            x = layer(x)
            if k in (1, 4, 7, 9, 11):
                ours, theirs = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8)).chunk(2)
                level = (1, 4, 7, 9, 11).index(k)
                total += F.conv2d((ours - theirs) ** 2, linear[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
        return -total
    if features == "clip":
        folder = str(ASSETS / "emoji-clip")
        pixels = CLIPImageProcessor.from_pretrained(folder)(images=as_pil(both), return_tensors="pt").pixel_values
        found = CLIPModel.from_pretrained(folder).get_image_features(pixels).pooler_output
    else:
        pixels = BitImageProcessor.from_pretrained(pretrained)(images=as_pil(both), return_tensors="pt").pixel_values
        found = AutoModel.from_pretrained(pretrained)(pixels).last_hidden_state[:, 0]
    return F.cosine_similarity(*found.chunk(2))


@pytest.mark.parametrize("features", ["dinov2", "clip", "lpips"])
def test_the_reference_itself_scores_highest(features, models, tmp_path):
    images = pictures(4, 64, 64)
    for k, picture in enumerate(as_pil(images)):
        picture.save(tmp_path / f"{k}.png")
    reward = Similarity(features, models[features])
    prompts = [PromptText("a", {"reference": f"{k % 2}.png"}, tmp_path) for k in range(4)]
    with torch.no_grad():
        expected = plain(features, models[features], images, images[[0, 1, 0, 1]])
    torch.testing.assert_close(reward.score(images, prompts), expected, rtol=0, atol=2e-3)
    assert len(reward._known) == 2
    assert torch.equal(reward.score(images[3:], prompts[3:]), reward.score(images, prompts)[3:])
    of_one = Similarity(features, models[features], reference=str(tmp_path / "2.png")).score(images, ["a"] * 4)
    assert int(of_one.argmax()) == 2
    assert float(of_one[2]) == pytest.approx(0.0 if features == "lpips" else 1.0, abs=1e-5)
    assert reward.range[0] <= float(of_one.min()) < float(of_one[2]) - 1e-3
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward.score(leaf, prompts)[2], leaf)  # 0 at the reference itself
    assert slope[2].abs().sum() > 0
    assert not slope[3].any()


def test_pictures_that_cannot_be_read_name_the_file(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    reward, images = Similarity("clip"), pictures(1, 64, 64)
    with pytest.raises(RewardError, match=r"reference .*broken\.png cannot be read as a picture"):
        reward.score(images, [PromptText("a", {"reference": "broken.png"}, tmp_path)])
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read: No such file"):
        Similarity("clip", reference=str(tmp_path / "nowhere.png")).load()
    with pytest.raises(UserError, match="features must be one of dinov2, clip, lpips, got 'dino'"):
        Similarity("dino")
    with pytest.raises(UserError, match=r"pretrained='alexnet\.pth' is no file; expected alex, vgg, or a file"):
        Similarity("lpips", "alexnet.pth").load()
    with pytest.raises(RewardError, match="Similarity-clip needs column 'reference' of the prompt 'a'"):
        reward.score(images, ["a"])


@pytest.mark.parametrize("features", ["clip", "lpips"])
def test_a_reference_that_changes_is_read_again(features, models, tmp_path):
    images, file = pictures(2, 64, 64), tmp_path / "a.png"
    first, second = as_pil(images)
    reward, prompts = (
        Similarity(features, models[features], label="of_mine"),
        [PromptText("a", {"reference": str(file)})],
    )
    assert reward.name.endswith("-of_mine")
    first.save(file)
    before = reward.score(images[1:], prompts)
    assert torch.equal(reward.score(images[1:], prompts), before)
    second.save(file)
    os.utime(file, ns=(0, 0))
    assert reward.score(images[1:], prompts) > before
