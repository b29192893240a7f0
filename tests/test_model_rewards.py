"""Rewards made of published models keep the contract, and score as their models do."""

import socket

import pytest
import torch

from svdd.errors import UserError
from svdd.rewards.base import Reward
from svdd.rewards.blip import GroundedText
from svdd.rewards.image_reward import ImageReward
from svdd.rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from tests.test_rewards import PROMPTS, pictures
from tests.tiny_reward_models import BLIP_TOKENS, plain_image_reward, save_tiny_image_reward


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models, by name, saved when first asked for."""
    saved = {}
    save = {"image_reward": save_tiny_image_reward}

    def folder(name: str) -> str:
        if name not in saved:
            saved[name] = save[name](tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


def image_reward(models) -> ImageReward:
    folder = models("image_reward")
    return ImageReward(f"{folder}/ImageReward.pt", tokenizer=folder)


TESTED = {"ImageReward": image_reward}


# ---- the contract


@pytest.fixture(scope="module", params=TESTED)
def reward(request, models) -> Reward:
    return TESTED[request.param](models)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine can be reached."""
    connect = socket.socket.connect

    def local(self, address):
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "localhost", "::1"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.mark.parametrize("count", [1, 4])
def test_one_finite_float32_per_image(reward, count):
    scores = reward.score(pictures(count), PROMPTS[:count])
    assert scores.shape == (count,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert reward.range[0] <= scores.min()
    assert scores.max() <= reward.range[1]


def test_a_score_belongs_to_its_row(reward):
    images, order = pictures(4), [2, 0, 3, 1]
    scores = reward.score(images, PROMPTS)
    assert len({round(score, 4) for score in scores.tolist()}) == 4
    permuted = reward.score(images[order], [PROMPTS[k] for k in order])
    torch.testing.assert_close(permuted, scores[order], rtol=0, atol=1e-5)
    for k in range(4):
        alone = reward.score(images[k : k + 1], PROMPTS[k : k + 1])
        torch.testing.assert_close(alone, scores[k : k + 1], rtol=0, atol=1e-5)


def test_images_are_left_alone(reward):
    images = pictures(2)
    before = images.clone()
    reward.score(images, PROMPTS[:2])
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_every_float_are_taken(reward, dtype):
    images = pictures(2)
    scores = reward.score(images.to(dtype), PROMPTS[:2])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward.score(images, PROMPTS[:2]), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", TESTED)
def test_the_module_may_be_bfloat16(name, when, models):
    images, reward = pictures(2), TESTED[name](models)
    if when == "after":
        reward.load()
    reward.to(torch.bfloat16)
    scores = reward.score(images, PROMPTS[:2])
    assert {parameter.dtype for parameter in reward.parameters()} <= {torch.bfloat16}
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, TESTED[name](models).score(images, PROMPTS[:2]), rtol=0.1, atol=0.1)


def test_not_square_images_are_taken(reward):
    assert reward.score(pictures(2, 24, 56), PROMPTS[:2]).shape == (2,)


def test_images_that_are_slices_of_others_are_taken(reward):
    part = pictures(4).permute(0, 1, 3, 2)[::2]
    torch.testing.assert_close(
        reward.score(part, PROMPTS[::2]), reward.score(part.contiguous(), PROMPTS[::2]), rtol=0, atol=1e-5
    )


def test_long_and_empty_prompts_are_scored(reward):
    assert reward.score(pictures(2), ["long " * 40, ""]).isfinite().all()


def test_the_gradient_is_the_slope(reward):
    if not reward.differentiable:
        assert not reward(pictures(1).requires_grad_(), PROMPTS[:1]).requires_grad
        return
    images = pictures(2, 36, 44).clamp(0.2, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).min() > 0
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 0.02
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).flatten(1).sum(1), rtol=0.02, atol=1e-5)


def test_the_gradient_of_a_row_comes_from_that_row(reward):
    if not reward.differentiable:
        pytest.skip("no gradient")
    images = pictures(3).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:3])[1], images)
    assert gradient[[0, 2]].abs().max() == 0
    assert gradient[1].abs().max() > 0


def test_scores_taken_in_inference_mode_do_not_stop_gradients(reward):
    if not reward.differentiable:
        pytest.skip("no gradient")
    with torch.inference_mode():
        reward.score(pictures(2), PROMPTS[:2])
    images = pictures(2).requires_grad_()
    reward(images, PROMPTS[:2]).sum().backward()
    assert images.grad.abs().max() > 0


def test_no_parameter_is_trainable(reward):
    reward.load()
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.children())


@pytest.mark.parametrize("name", TESTED)
def test_weights_are_read_when_needed(name, models):
    assert not list(TESTED[name](models).parameters())


def assert_refused(reward: Reward, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        reward.load()
    assert "\n" not in str(caught.value)


# ---- ImageReward


@pytest.mark.parametrize("side", [32, 40])
def test_image_reward_is_the_published_arithmetic(models, side):
    reward, images = image_reward(models), pictures(4, side, side)
    state = torch.load(f"{models('image_reward')}/ImageReward.pt", weights_only=True)
    reward.load()
    pixels = images if side == 32 else torch.nn.functional.interpolate(images, 32, mode="bicubic", antialias=True)
    tokens = reward.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=BLIP_TOKENS, return_tensors="pt"
    )
    assert tokens.input_ids.shape == (4, BLIP_TOKENS)
    assert tokens.input_ids[:, 0].tolist() == [reward.tokenizer.cls_token_id] * 4
    expected = plain_image_reward(
        state, normalise(pixels.clamp(0, 1), CLIP_MEAN, CLIP_STD), tokens.input_ids, tokens.attention_mask
    )
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


def test_image_reward_uses_every_weight_of_the_file(models):
    reward = image_reward(models)
    reward.load()
    state = torch.load(f"{models('image_reward')}/ImageReward.pt", weights_only=True)
    used = [name for name in state if not name.startswith(("blip.vision_proj", "blip.text_proj"))]
    assert len(list(reward.network.parameters())) == len([name for name in used if "position_ids" not in name])


def test_image_reward_depends_on_image_and_prompt(models):
    reward, images = image_reward(models), pictures(4)
    assert reward.score(images, PROMPTS[:1] * 4).std() > 1e-3
    assert reward.score(images[:1].repeat(4, 1, 1, 1), PROMPTS).std() > 1e-3


def test_image_reward_has_the_published_sizes():
    with torch.device("meta"):
        network = GroundedText(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 16,
            },
            {"hidden_size": 768, "encoder_hidden_size": 1024, "num_attention_heads": 12},
        )
    vision, text, head = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (network.vision, network.text, network.head)
    )
    cross = 12 * (2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768)
    assert vision == 303_301_632  # ViT-L/16 at 224 px without a classifier
    assert text == 108_891_648 + cross  # BERT-base without pooler; two words more, the two token types less
    assert head == 768 * 1024 + 1024 + 1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1


def test_image_reward_refuses_what_is_another_model(models, tmp_path, tiny_clip):
    folder = models("image_reward")
    state = torch.load(f"{folder}/ImageReward.pt", weights_only=True)
    assert_refused(ImageReward(f"{folder}/nowhere.pt", tokenizer=folder), "there is no file")
    assert_refused(ImageReward(f"{folder}/ImageReward.pt", tokenizer=f"{folder}/nowhere"), "tokenizer=")
    assert_refused(ImageReward(f"{folder}/ImageReward.pt", tokenizer=tiny_clip), "tokenizer=")
    assert_refused(ImageReward(f"{tiny_clip}/model.safetensors", tokenizer=folder), "another architecture")
    torch.save({name: part for name, part in state.items() if "blocks.1.attn.qkv" not in name}, tmp_path / "a.pt")
    assert_refused(
        ImageReward(str(tmp_path / "a.pt"), tokenizer=folder), r"another architecture: 2 names differ.*qkv\.bias"
    )
    (tmp_path / "b.pt").write_bytes(b"no weights")
    assert_refused(ImageReward(str(tmp_path / "b.pt"), tokenizer=folder), "cannot be read as weights")
    assert_refused(ImageReward(tokenizer=folder, local_files_only=True), "cannot be fetched")
