"""Rewards based on published models reproduce the models' scores."""

import json
import math
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
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
    ViTImageProcessor,
    ViTModel,
)

from svdd import RewardError, UserError
from svdd.rewards.aesthetic import Aesthetic
from svdd.rewards.base import Reward
from svdd.rewards.classifier import Classifier, Preprocessing, find_label
from svdd.rewards.clip import CLIPScore
from svdd.rewards.image_reward import GroundedText, ImageReward
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, normalise
from svdd.rewards.vlm_judge import VLMJudge
from tests.test_rewards import within_gamut
from tests.tested_rewards import PROMPTS, as_pil, pictures, serving
from tests.tiny_reward_models import (
    BLIP_TOKENS,
    LABELS,
    byte_tokenizer,
    chat_server,
    judge,
    logprobs,
    plain_image_reward,
    save_tiny_llava,
    save_tiny_vit,
    seen_and_asked,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with serving(tmp_path_factory.mktemp) as found:
        yield found


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


def image_reward(models) -> ImageReward:
    folder = models("image_reward")
    return ImageReward(f"{folder}/ImageReward.pt", tokenizer=folder)


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
    tokens = reward.words(PROMPTS, padding="max_length", truncation=True, max_length=BLIP_TOKENS, return_tensors="pt")
    assert tokens.input_ids.shape == (4, BLIP_TOKENS)
    assert tokens.input_ids[:, 0].tolist() == [reward.words.cls_token_id] * 4
    expected = plain_image_reward(
        state, normalise(pixels.clamp(0, 1), CLIP_MEAN, CLIP_STD), tokens.input_ids, tokens.attention_mask
    )
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


def test_image_reward_cuts_the_centre_as_torchvision(models):
    """Of 32 x 47 pixels, the crop starts at column 8; transformers would start at 7."""
    reward, images = image_reward(models), pictures(4, 32, 47)
    torch.testing.assert_close(
        reward.score(images, PROMPTS), reward.score(images[..., 8:40], PROMPTS), rtol=0, atol=1e-6
    )


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
    assert text == 108_891_648 + cross  # BERT-base without pooler, plus two words, minus two token types
    assert head == 768 * 1024 + 1024 + 1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1


def test_image_reward_refuses_another_model(models, tmp_path, tiny_clip):
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
    assert_refused(ImageReward(tokenizer=folder, local_files_only=True), "downloads are off")


# ---- CLIP


def write(file: str, **settings) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = json.loads((path / file).read_text()) if (path / file).is_file() else {}
        (path / file).write_text(json.dumps({**found, **settings}))

    return change


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    file = "model.safetensors"
    return lambda path: save_file(change(load_file(path / file)), path / file, {"format": "pt"})


def without(word: str) -> Callable[[Path], None]:
    return tensors(lambda state: {name: tensor for name, tensor in state.items() if word not in name})


CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
DAMAGE = {  # message: damage of a CLIP
    r"^CLIPScore: the tokenizer of .* is incomplete: .* lacks vocab\.json, merges\.txt": lambda path: (
        path / "tokenizer.json"
    ).unlink(),
    "lacks 1 weights of CLIPModel, first visual_projection.weight": without("visual_projection"),
    "holds 1 weights that CLIPModel does not use, first odd": tensors(lambda state: state | {"odd": torch.ones(1)}),
    r"model\.safetensors is damaged \(.*\); copy or download it again": lambda path: (
        path / "model.safetensors"
    ).write_bytes((path / "model.safetensors").read_bytes()[:-9]),
    "weights of other shapes than its config.json states, first visual_projection.weight: ": tensors(
        lambda state: state | {"visual_projection.weight": torch.ones(3, 3)}
    ),
    "prepares pictures otherwise .*expected the shorter side resized to 32": write(
        "preprocessor_config.json", do_center_crop=False, size={"height": 32, "width": 32}
    ),
    "the image processor of .* cannot be loaded: .*not a valid JSON file": lambda path: (
        path / "preprocessor_config.json"
    ).write_text("{"),
    "cannot be loaded: .*custom code": write("config.json", **CODE),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_clip_is_refused(tiny_clip, tmp_path, message):
    path = shutil.copytree(tiny_clip, tmp_path / "clip")
    DAMAGE[message](path)
    assert_refused(CLIPScore(str(path)), message)


def test_other_incomplete_models_are_refused(models, tiny_clip, tiny_head, tmp_path):
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    without("vision_model.post_layernorm")(clip)
    assert_refused(Aesthetic(str(clip), tiny_head), "lacks 2 weights of CLIPVisionModelWithProjection")
    classifier = shutil.copytree(models("vit"), tmp_path / "vit")
    without("classifier.weight")(classifier)
    assert_refused(
        Classifier(str(classifier), 0), "lacks 1 weights of ViTForImageClassification, first classifier.weight"
    )
    words = shutil.copytree(models("image_reward"), tmp_path / "words")
    for file in words.glob("*token*"):
        file.unlink()
    assert_refused(ImageReward(f"{words}/ImageReward.pt", tokenizer=str(words)), "tokenizer=.*has no tokenizer_config")


# ---- Classifier


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_classifier_scores_as_transformers(models, name, size):
    """Scores equal transformers' up to the processor's rounding: 8 bits after each of two resizing passes."""
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


def test_labels_of_a_multi_label_classifier_are_scored_independently(tmp_path):
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
        MobileViTImageProcessor(size=EDGE, crop_size=SQUARE),
        LevitImageProcessor(size=EDGE, crop_size=SQUARE),
        PoolFormerImageProcessor(size=EDGE, crop_size=SQUARE),
        EfficientNetImageProcessor(size=SQUARE),
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
        ViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 40}),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "resample") else str(part),
)
def test_preprocessing_is_the_processors(processor, shape):
    """Pixels agree within 1.5 / 255: the processor rounds to 8 bits after each of two passes."""
    images, made = within_gamut(2, *shape), Preprocessing(processor, "here")
    pixels = processor(images=as_pil(images), return_tensors="pt").pixel_values
    assert made(images).shape == pixels.shape
    white = made(torch.ones(1, 3, *shape)) - made(torch.zeros(1, 3, *shape))
    assert ((made(images) - pixels) * 255).abs().max() < 1.5 * white.max()


def test_preprocessing_is_clamped_to_black_and_white_where_resizing_overshoots():
    made = Preprocessing(SiglipImageProcessor(size=SQUARE, resample=3), "here")
    edge = torch.zeros(1, 3, 60, 60)
    edge[..., 30:] = 1
    assert (float(made(edge).min()), float(made(edge).max())) == (-1, 1)
    made.processor.resize = made.original.resize
    assert made(edge).max() > 1.01


def test_preprocessing_is_that_of_timm():
    pytest.importorskip("timm")
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    published = {"input_size": (3, 56, 56), "interpolation": "bicubic", "crop_pct": 0.9}
    for options in ({"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}, {"crop_mode": "squash"}):
        processor = TimmWrapperImageProcessor(published | options)
        made, images = Preprocessing(processor, "here"), within_gamut(2, 101, 64)
        pixels = processor(images=as_pil(images)).pixel_values
        white = made(torch.ones(1, 3, 8, 8)) - made(torch.zeros(1, 3, 8, 8))
        assert ((made(images) - pixels) * 255).abs().max() < 1.5 * white.max()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (EfficientNetImageProcessor(size=SQUARE, rescale_offset=True), "EfficientNetImageProcessor.* pixels differ by"),
        (lambda images, **_: BatchFeature({"pixel_values": torch.zeros(1, 3, 2, 2)}), "with a gradient"),
        (object(), "object that svdd cannot follow"),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "resample") else None,
)
def test_unsupported_preprocessing_is_refused(processor, message):
    with pytest.raises(UserError, match=message) as caught:
        Preprocessing(processor, "here")
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
    with pytest.raises(UserError, match="label=5 is none of the 5 labels, such as 'tabby, tabby cat', 'crane'"):
        find_label(5, LABELS)


def test_a_classifier_refuses_another_model(models, tmp_path, tiny_clip, sd15):
    assert_refused(Classifier(models("vit"), "dog"), "Classifier: label='dog' is none of the 5 labels")
    assert_refused(Classifier(str(tmp_path / "nowhere"), 0), "is not a folder; expected a folder saved by")
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


# ---- VLMJudge with a local model

QUESTION = 'Does this image show: "{prompt}"? Answer yes or no.'


def log_odds(model: torch.nn.Module, tokenizer, inputs) -> float:
    """Returns log-odds of the next token from its probabilities."""
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    yes, no = (
        sum(float(probabilities[tokenizer.convert_tokens_to_ids(form)]) for form in forms)
        for forms in (("yes", "Yes", "\u0120yes", "\u0120Yes"), ("no", "No", "\u0120no", "\u0120No"))
    )
    return math.log(yes / no)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_the_judge_scores_the_next_token(models, name):
    folder, images, prompts = models(name), pictures(4, 40, 56), ["a", "a longer prompt", "panda", "{prompt}"]
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForImageTextToText, AutoProcessor))
    expected = []
    for image, prompt in zip(as_pil(images), prompts, strict=True):
        question = QUESTION.replace("{prompt}", prompt)
        if name == "llava":
            inputs = processor(images=image, text=f"<image>\n{question}", return_tensors="pt")
        else:
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
        expected.append(log_odds(model.eval(), processor.tokenizer, inputs))
    reward = VLMJudge(folder, batch_size=3)
    torch.testing.assert_close(reward.score(images, prompts), torch.tensor(expected), rtol=0, atol=1e-5)
    reward.network.keeps = False  # for models that always return all logits
    torch.testing.assert_close(reward.score(images, prompts), torch.tensor(expected), rtol=0, atol=1e-5)
    assert torch.tensor(expected).std() > 0.05


def test_the_judge_uses_the_given_question(models):
    folder, images = models("llava"), pictures(2)
    asked = VLMJudge(folder, question="Is this {prompt}, {maybe}? {").score(images, ["red", "blue"])
    assert not torch.equal(asked, VLMJudge(folder).score(images, ["red", "blue"]))
    same = VLMJudge(folder, question="Is it pretty?").score(images[:1].repeat(2, 1, 1, 1), ["red", "blue"])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)


def test_the_judge_refuses_another_model(models, tmp_path):
    assert_refused(VLMJudge(models("vit")), "cannot be loaded: Unrecognized configuration class")
    assert_refused(VLMJudge(str(tmp_path / "nowhere")), "is not a folder; expected a folder saved by")
    assert_refused(VLMJudge("owner/name", local_files_only=True), "cannot be loaded")
    speechless = tmp_path / "speechless"
    speechless.mkdir()
    assert_refused(VLMJudge(save_tiny_llava(speechless, words=("yes", "Yes"))), "no single token for yes, or none for")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").symlink_to(f"{models('llava')}/config.json")
    assert_refused(VLMJudge(str(empty)), "cannot be loaded")
    (empty / "model.safetensors").symlink_to(f"{models('llava')}/model.safetensors")
    assert_refused(VLMJudge(str(empty)), "pretrained=")  # no processor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"model": "m"}, "belong to an endpoint"),
        ({"api_key_env": "K"}, "belong to an endpoint"),
        ({"endpoint": "http://localhost/v1"}, "an endpoint needs model"),
        ({"endpoint": "http://localhost/v1", "model": "m", "pretrained": "p"}, "takes no pretrained"),
        ({"endpoint": "localhost:8000", "model": "m"}, "endpoint must be an address"),
        ({"endpoint": "file:///etc/hostname", "model": "m"}, "endpoint must be an address"),
        ({"endpoint": "http://u:secret@host:port/v1", "model": "m"}, "endpoint must be an address"),
        ({"endpoint": "http://localhost/v1?key=secret", "model": "m"}, "without a query, user or password"),
        ({"endpoint": "http://user:secret@localhost/v1", "model": "m"}, "without a query, user or password"),
        ({"endpoint": "http://[secret", "model": "m"}, "endpoint must be an address"),
        ({"endpoint": "http://localhost/v1", "model": "m", "timeout": 0}, "timeout must be > 0, got 0"),
        ({"endpoint": "http://localhost/v1", "model": "m", "retries": -1}, "retries must be >= 0, got -1"),
        ({"endpoint": "http://localhost/v1", "model": "m", "concurrency": 0}, "concurrency must be >= 1, got 0"),
    ],
)
def test_arguments_of_the_judge_are_checked(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        VLMJudge(**arguments)
    assert "secret" not in str(caught.value)


# ---- VLMJudge with an endpoint


def ask(address: str, **arguments) -> torch.Tensor:
    reward = VLMJudge(endpoint=address, model="tiny", **{"backoff": 0.001, "timeout": 20, **arguments})
    return reward.score(pictures(2), PROMPTS[:2])


def failure(address: str, **arguments) -> str:
    with pytest.raises(RewardError) as caught:
        ask(address, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"endpoint {address}, model 'tiny': ")
    return message


def test_an_endpoint_receives_the_image_and_the_question():
    images = pictures(3, 20, 31)
    with chat_server(lambda body, handler: judge(body)) as (address, asked):
        reward = VLMJudge(endpoint=address + "/", model="tiny", question="{prompt}?")
        scores = reward.score(images, PROMPTS[:3])
    assert [request["path"] for request in asked] == ["/v1/chat/completions"] * 3
    assert all("Authorization" not in request["headers"] for request in asked)
    body = asked[0]["body"]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("tiny", 1, True, 20)
    questions = [seen_and_asked(request["body"])[1] for request in asked]
    assert sorted(questions) == sorted(prompt + "?" for prompt in PROMPTS[:3])
    for request, question in zip(asked, questions, strict=True):
        picture = (images[PROMPTS.index(question[:-1])] * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert (seen_and_asked(request["body"])[0] == picture.numpy()).all()
    lengths = torch.tensor([float(len(prompt) + 1) for prompt in PROMPTS[:3]])
    torch.testing.assert_close(scores, images.mean((1, 2, 3)) - 2 + lengths / 100, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (logprobs(yes=-0.5, no=-1.5), 1.0),
        (logprobs(**{"yes": -1.0, " Yes": -1.0, "No": -1.0, "NO": -1.0, "\u0120yes": -1.0, "x": -3.0}), math.log(1.5)),
        (logprobs(**{"Yes": -0.25, "maybe": -2.0, "I": -7.5}), 7.25),
        (logprobs(**{"perhaps": -0.25, "no": -2.0, "I": -7.0}), -5.0),
        (logprobs(yes=0.0, no=-math.inf), 1e4),
    ],
)
def test_log_odds_are_read_from_the_likeliest_tokens(said, score):
    with chat_server(lambda body, handler: said) as (address, _):
        torch.testing.assert_close(ask(address), torch.tensor([score] * 2))


def test_log_odds_keep_their_digits_where_half_precision_is_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with chat_server(lambda body, handler: logprobs(yes=-0.123456, no=-20.5)) as (address, _):
            assert ask(address).tolist() == pytest.approx([20.376544] * 2, rel=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_request_is_retried_after_a_transient_failure():
    failures = iter(
        ["hang up", (429, {}, {"Retry-After": "0"}), (503, b"<html>busy</html>", {}), (500, {}, {}), (425, {}, {})]
    )

    def answer(body, handler):
        said = next(failures, None)
        if said == "hang up":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return None
        return judge(body) if said is None else said

    with chat_server(answer) as (address, asked):
        assert ask(address, retries=5, concurrency=1).isfinite().all()
        assert len(asked) == 5 + 2


def test_retries_are_limited():
    with chat_server(lambda body, handler: (503, {"error": {"message": "loading\nthe model"}}, {})) as (address, asked):
        message = failure(address, retries=2, concurrency=1)
        assert message == f"endpoint {address}, model 'tiny': 503 Service Unavailable: loading after 3 attempts"
        assert len(asked) == 3


def test_waits_between_attempts_double(monkeypatch):
    waits, after = [], iter(["", "70", "1000", *[""] * 20])

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr("svdd.rewards.models.http_client.sleep", note)
    with chat_server(lambda body, handler: (503, {}, {"Retry-After": next(after)})) as (address, _):
        failure(address, retries=10, backoff=0.5, concurrency=1)
    least = [0.5, 70, 120, 4, 8, 16, *[30] * 4]
    assert all(low <= wait <= 1.25 * low for low, wait in zip(least, waits, strict=True))
    assert len(set(waits[-4:])) == 4  # jitter


def test_an_endpoint_that_hangs_times_out():
    released = threading.Event()

    def answer(body, handler):
        released.wait(20)

    with chat_server(answer) as (address, _):
        message = failure(address, timeout=0.1, retries=1)
        released.set()
    assert message.endswith("no answer within 0.1 s after 2 attempts")


@pytest.mark.parametrize("part", ["headers", "body", "size"])
def test_an_endless_answer_ends(part):
    """Each byte arrives in time, but the answer would never be complete."""

    def answer(body, handler):
        write, pause = handler.wfile.write, threading.Event().wait
        write(b"HTTP/1.1 200 OK\r\n" + (b"" if part == "headers" else b"\r\n"))
        with suppress(OSError):
            while True:
                write(b"x" * 2**16 if part == "size" else b"x")
                pause(0 if part == "size" else 0.02)

    with chat_server(answer) as (address, _):
        message = failure(address, timeout=20 if part == "size" else 0.3, retries=0)
    assert message.endswith("larger than 1048576 bytes" if part == "size" else "no answer within 0.3 s")


def test_an_unreachable_endpoint():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    message = failure(f"http://127.0.0.1:{port}/v1", retries=1)
    assert "refused" in message
    assert message.endswith("after 2 attempts")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"<html>hello</html>", "the answer is not JSON; is this the address of the API"),
        (b"\xff\xfe", "the answer is not JSON"),
        ([], "the answer is no chat completion with a choice and logprobs: '[]'"),
        ({"choices": [{"logprobs": {"content": [{"token": "yes"}]}}]}, "the answer is no chat completion"),
        ({"choices": [{"message": {"content": "yes"}, "logprobs": None}]}, "the answer has no logprobs"),
        (logprobs(perhaps=-0.5, maybe=-1.5), "neither yes nor no is among the 2 most likely tokens; first 'perhaps'"),
        ((404, {"error": {"message": "The model `tiny` does not exist."}}, {}), "404 Not Found: The model `tiny` does"),
        ((404, {"detail": "Not Found"}, {}), "404 Not Found: Not Found"),
        ((400, b"bad", {}), "400 Bad Request"),
        ((307, b"", {"Location": "http://127.0.0.1:9/v1"}), "307 Temporary Redirect"),
    ],
)
def test_an_unusable_answer_is_an_error_without_retries(said, message):
    with chat_server(lambda body, handler: said) as (address, asked):
        assert message in failure(address, retries=3, concurrency=1)
        assert len(asked) == 1


def test_a_key_is_sent_and_never_shown(monkeypatch, capfd):
    key = "sk-very-secret"
    monkeypatch.setenv("JUDGE_KEY", f" {key}\n")

    def answer(body, handler):
        assert handler.headers["Authorization"] == f"Bearer {key}"
        return answers.pop(0)

    answers = [(401, {"error": {"message": f"wrong key sk-very-*** {key}"}}, {})]
    with chat_server(answer) as (address, _):
        message = failure(address, api_key_env="JUDGE_KEY", concurrency=1)
        assert message.endswith("401 Unauthorized")
        answers = [(400, {"error": {"message": f"what is {key}"}}, {})]
        message = failure(address, api_key_env="JUDGE_KEY", concurrency=1)
        assert message.endswith("400 Bad Request: what is ***")
        answers = [logprobs(yes=-1.0, no=-1.0)] * 2
        reward = VLMJudge(endpoint=address, model="tiny", api_key_env="JUDGE_KEY")
        assert reward.score(pictures(2), PROMPTS[:2]).tolist() == [0, 0]
    assert key not in f"{reward!r} {vars(reward)} {reward.service!r} {capfd.readouterr()}"


@pytest.mark.parametrize(("value", "message"), [(None, "JUDGE_KEY.* is not set"), ("a\nb", "JUDGE_KEY.* holds no key")])
def test_a_missing_key_is_an_error_at_loading(monkeypatch, value, message):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    assert_refused(VLMJudge(endpoint="http://127.0.0.1:9/v1", model="tiny", api_key_env="JUDGE_KEY"), message)


def test_requests_are_concurrent():
    together = threading.Barrier(3)

    def answer(body, handler):
        together.wait(20)  # passes only with three concurrent requests
        return judge(body)

    with chat_server(answer) as (address, _):
        reward = VLMJudge(endpoint=address, model="tiny", concurrency=3)
        assert reward.score(pictures(3), PROMPTS[:3]).isfinite().all()


def test_the_byte_tokenizer_has_words_with_and_without_a_space():
    tokenizer = byte_tokenizer()
    assert [tokenizer.tokenize(text) for text in ("yes", " no", "YES")] == [["yes"], ["\u0120no"], ["Y", "E", "S"]]
