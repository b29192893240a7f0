"""Rewards made of published models keep the contract, and score as their models do."""

import socket

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    SiglipImageProcessor,
    TextNetImageProcessor,
    ViTImageProcessor,
    ViTModel,
)

from svdd.errors import UserError
from svdd.rewards.base import Reward
from svdd.rewards.blip import GroundedText
from svdd.rewards.classifier import Classifier, find_label
from svdd.rewards.image_processing import read_preprocessing
from svdd.rewards.image_reward import ImageReward
from svdd.rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from tests.test_rewards import PROMPTS, as_pil, pictures, within_gamut
from tests.tiny_reward_models import (
    BLIP_TOKENS,
    LABELS,
    plain_image_reward,
    save_tiny_image_reward,
    save_tiny_resnet,
    save_tiny_vit,
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models, by name, saved when first asked for."""
    saved = {}
    save = {"image_reward": save_tiny_image_reward, "vit": save_tiny_vit, "resnet": save_tiny_resnet}

    def folder(name: str) -> str:
        if name not in saved:
            saved[name] = save[name](tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


def image_reward(models) -> ImageReward:
    folder = models("image_reward")
    return ImageReward(f"{folder}/ImageReward.pt", tokenizer=folder)


TESTED = {
    "ImageReward": image_reward,
    "Classifier": lambda models: Classifier(models("vit"), "Egyptian cat"),
    "Classifier-logit": lambda models: Classifier(models("resnet"), 4, logit=True),
}


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
    step = 0.005
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).flatten(1).sum(1), rtol=0.02, atol=1e-4)


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


# ---- Classifier


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_classifier_scores_as_transformers(models, name, size):
    """Where it resizes, the processor rounds to 8 bits after each of two passes."""
    folder, images = models(name), within_gamut(4, *size)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=as_pil(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits
    exact = name == "vit" and size == (32, 32)
    close = {"rtol": 0, "atol": 1e-5 if exact else 0.02}
    for label, index in (("TABBY", 0), ("egyptian cat", 2), (3, 3), ("red apple", 4)):
        scores = Classifier(folder, label).score(images, PROMPTS)
        torch.testing.assert_close(scores, logits.log_softmax(-1)[:, index], **close)
        scores = Classifier(folder, label, logit=True).score(images, PROMPTS)
        torch.testing.assert_close(scores, logits[:, index], **close)
    assert logits.std() > 0.1


def test_labels_that_do_not_exclude_each_other_are_scored_alone(tmp_path):
    folder, images = save_tiny_vit(tmp_path, problem_type="multi_label_classification"), pictures(2)
    logit, score = (Classifier(folder, 2, logit=logit).score(images, PROMPTS[:2]) for logit in (True, False))
    torch.testing.assert_close(score, -(1 + (-logit).exp()).log())


EDGE, SQUARE = {"shortest_edge": 36}, {"height": 32, "width": 32}


@pytest.mark.parametrize("shape", [(32, 32), (100, 64), (41, 57), (24, 30)])
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size=SQUARE),
        ViTImageProcessor(size={"height": 24, "width": 40}, resample=3, do_normalize=False),
        ViTImageProcessor(size=SQUARE, do_rescale=False),
        SiglipImageProcessor(size=SQUARE),
        DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE),
        BeitImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE, do_center_crop=True),
        BitImageProcessor(size=EDGE, crop_size=SQUARE),
        CLIPImageProcessor(size=EDGE, crop_size={"height": 31, "width": 33}),
        MobileNetV2ImageProcessor(size=EDGE, crop_size=SQUARE),
        ConvNextImageProcessor(size={"shortest_edge": 32}),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        ConvNextImageProcessor(do_resize=False),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "resample") else str(part),
)
def test_preprocessing_is_the_processors(processor, shape):
    """Within 1.5 / 255: the processor rounds to 8 bits after each of two passes."""
    images, made = within_gamut(2, *shape), read_preprocessing(processor, "here")
    pixels = processor(images=as_pil(images), return_tensors="pt").pixel_values
    units = torch.tensor(list(made.std))[:, None, None] / made.scale * 255
    assert made(images).shape == pixels.shape
    assert ((made(images) - pixels) * units).abs().max() < 1.5


def test_preprocessing_is_that_of_timm():
    pytest.importorskip("timm")
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    published = {"input_size": (3, 56, 56), "interpolation": "bicubic", "crop_pct": 0.9}
    processor = TimmWrapperImageProcessor(published | {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)})
    made, images = read_preprocessing(processor, "here"), within_gamut(2, 100, 64)
    pixels = processor(images=as_pil(images)).pixel_values
    assert ((made(images) - pixels) * torch.tensor(made.std)[:, None, None] * 255).abs().max() < 1.5
    stretched = TimmWrapperImageProcessor(published | {"crop_mode": "squash"})
    with pytest.raises(UserError, match="TimmWrapperImageProcessor that"):
        read_preprocessing(stretched, "here")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (MobileViTImageProcessor(size=EDGE, crop_size=SQUARE), "MobileViTImageProcessor.* pixels differ by"),
        (LevitImageProcessor(size=EDGE, crop_size=SQUARE), "LevitImageProcessor"),
        (PoolFormerImageProcessor(size=EDGE, crop_size=SQUARE), "PoolFormerImageProcessor"),
        (EfficientNetImageProcessor(size=SQUARE), "EfficientNetImageProcessor.* pixels differ by"),
        (ViTImageProcessor(size=SQUARE, resample=0), "resamples in PIL's mode 0; expected 2"),
        (ViTImageProcessor(size=SQUARE, resample=1), "resamples in PIL's mode 1"),
        (ViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 40}), "size is .*longest_edge.*; expected"),
        (CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE), "shape"),
        (TextNetImageProcessor(), "shape"),
        (object(), "object that svdd cannot follow"),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "resample") else None,
)
def test_preprocessing_that_is_not_followed_is_refused(processor, message):
    with pytest.raises(UserError, match=message) as caught:
        read_preprocessing(processor, "here")
    assert "\n" not in str(caught.value)


def test_labels_are_found_by_name_or_index():
    assert [find_label(label, LABELS) for label in ("Tabby Cat", "tabby", "tabby, tabby cat", 1, "red apple")] == [
        0,
        0,
        0,
        1,
        4,
    ]
    with pytest.raises(UserError, match=r"label='crane' is the name of 2 labels; give one of their indices: \[1, 3\]"):
        find_label("crane", LABELS)
    with pytest.raises(UserError, match=r"label='egyptian rat' is none of the 5 labels.*did you mean 'Egyptian cat'"):
        find_label("egyptian rat", LABELS)
    with pytest.raises(UserError, match="label=5 is none of the 5 labels, such as tabby, tabby cat, crane"):
        find_label(5, LABELS)


def test_a_classifier_refuses_what_is_another_model(models, tmp_path, tiny_clip, sd15):
    assert_refused(Classifier(models("vit"), "dog"), "Classifier: label='dog' is none of the 5 labels")
    assert_refused(Classifier(str(tmp_path / "nowhere"), 0), "has no config.json")
    assert_refused(Classifier(f"{sd15}/text_encoder", 0), "cannot be loaded")
    assert_refused(Classifier("owner/name", 0, local_files_only=True), "cannot be loaded")
    backbone = tmp_path / "backbone"
    ViTModel.from_pretrained(models("vit")).save_pretrained(backbone)
    assert_refused(Classifier(str(backbone), 0), "lacks 2 weights of ViTForImageClassification, first classifier.bias")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").symlink_to(f"{models('vit')}/config.json")
    assert_refused(Classifier(str(empty), 0), "cannot be loaded")
    (empty / "model.safetensors").symlink_to(f"{models('vit')}/model.safetensors")
    assert_refused(Classifier(str(empty), 0), "cannot be loaded")  # no processor


def test_the_name_of_a_classifier_is_its_label(models):
    assert Classifier(models("vit"), "red apple").name == "Classifier-red apple"
