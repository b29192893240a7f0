"""Rewards against independently computed or published numbers, and the inputs that they refuse."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from svdd import RewardError, UserError
from svdd.assets.hub import find_file, read_weights
from svdd.rewards.aesthetic import Aesthetic, AestheticHead
from svdd.rewards.base import is_device_failure
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.colorfulness import Colorfulness
from svdd.rewards.function import FunctionReward
from svdd.rewards.hps_v2 import HPSv2
from svdd.rewards.jpeg import Compressibility
from svdd.rewards.models.clip_models import OpenClipModel
from svdd.rewards.models.pixels import fit_square
from svdd.rewards.pick_score import PickScore
from svdd.rewards.sharpness import Sharpness
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.z_scored import ZScored
from svdd.runs.prediction import predict_or_skip
from svdd.runs.prompts import Prompt
from tests.tested_rewards import PROMPTS, as_pil, pictures

LAION_HEAD = Path(os.environ.get("SVDD_TEST_DATA", "../shared/data")) / "sac+logos+ava1-l14-linearMSE.pth"


# ---- published models


@pytest.mark.skipif(not LAION_HEAD.is_file(), reason="the real LAION head is not here")
def test_the_aesthetic_head_gives_the_published_numbers():
    """The head agrees with an independent computation in float64 for three vectors."""
    head = AestheticHead().double()
    head.load_state_dict({name: tensor.double() for name, tensor in read_weights(LAION_HEAD).items()})
    head.eval()
    k = torch.arange(768, dtype=torch.float64)
    vectors = F.normalize(torch.stack([k.sin(), (k / 7).cos(), torch.ones_like(k)]), dim=1)
    expected = torch.tensor([5.867869, 5.378923, 4.883285], dtype=torch.float64)
    torch.testing.assert_close(head(vectors), expected, rtol=0, atol=5e-6)


def test_the_aesthetic_score_is_the_head_on_the_normalised_embedding(tiny_clip, tiny_head):
    images = ((pictures(4, 32, 32) * 0.4 + 0.3) * 255).round() / 255
    reward = Aesthetic(tiny_clip, tiny_head)
    reward.load()
    clip = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (reward.mean, reward.std))
    with torch.no_grad():
        features = clip(pixel_values=(images - mean) / std).image_embeds.double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for layer in (0, 2, 4, 6, 7):  # written out: no activation between the layers
        weights = torch.load(tiny_head, weights_only=True)
        features = features @ weights[f"layers.{layer}.weight"].double().numpy().T
        features += weights[f"layers.{layer}.bias"].double().numpy()
    np.testing.assert_allclose(reward.score(images, PROMPTS).numpy(), features[:, 0], atol=1e-5)


def test_pick_score_is_the_models_own_logit(tiny_clip):
    """Images of 32 px are not resized, so pixels agree to 1e-6."""
    images = pictures(4, 32, 32)
    reward = PickScore(tiny_clip, processor=None)
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = reward.network.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(pixel_values=reward.network.preprocess(images), **tokens)
    torch.testing.assert_close(reward.score(images, PROMPTS), output.logits_per_image.diagonal(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [32, 47])
def test_open_clip_scores_equal_open_clips(tiny_open_clip, side):
    """PIL's resizing rounds to 8 bits: pixels differ by up to 1.5 / 255, scores by 3e-3; at 32 px they are equal."""
    import open_clip

    images = ((pictures(4, side, side) * 0.4 + 0.3) * 255).round() / 255
    reward = CLIPScore(architecture=tiny_open_clip)
    model, transform = open_clip.create_model_from_pretrained(tiny_open_clip)
    model.eval()
    pixels = torch.stack([transform(picture) for picture in as_pil(images)])
    with torch.no_grad():
        image, text, _ = model(pixels, open_clip.get_tokenizer(tiny_open_clip)(PROMPTS))
    std = torch.tensor(reward.network.std)[:, None, None]
    assert ((reward.network.preprocess(images) - pixels) * std).abs().max() < (1e-6 if side == 32 else 1.5 / 255)
    expected = F.cosine_similarity(image, text)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-5 if side == 32 else 3e-3)
    assert reward.name == "CLIPScore-" + tiny_open_clip.rsplit("/", 1)[1]


@pytest.fixture
def prepared(tiny_open_clip, tmp_path):
    """Returns the tiny open_clip model with other preprocessing settings."""

    def save(**wants) -> str:
        source, target = Path(tiny_open_clip.removeprefix("local-dir:")), tmp_path / "prepared"
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)
        config = json.loads((source / "open_clip_config.json").read_text()) | {"preprocess_cfg": wants}
        config["model_cfg"]["vision_cfg"]["image_size"] = wants.get("size", 32)
        (target / "open_clip_config.json").unlink()
        (target / "open_clip_config.json").write_text(json.dumps(config))
        return f"local-dir:{target}"

    return save


@pytest.mark.parametrize("size", [(32, 47), (35, 32), (32, 33), (48, 95), (70, 41)])
@pytest.mark.parametrize("wants", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}], ids=str)
def test_open_clips_preprocessing_is_reproduced(prepared, wants, size):
    """Pixels agree to 1.5 / 255 when PIL resizes, 1e-6 when it only crops; bicubic and bilinear differ by 6 / 255."""
    import open_clip

    images = ((pictures(4, *size) * 0.4 + 0.3) * 255).round() / 255
    transform = open_clip.create_model_from_pretrained(prepared(**wants))[1]
    pixels = torch.stack([transform(picture) for picture in as_pil(images)])
    network = CLIPScore(architecture=prepared(**wants)).network
    difference = (network.preprocess(images) - pixels) * torch.tensor(network.std)[:, None, None]
    cut = min(size) == 32 and "resize_mode" not in wants
    assert difference.abs().max() < (1e-6 if cut else 1.5 / 255)


@pytest.mark.parametrize("wants", [{"resize_mode": "longest"}, {"size": [32, 48]}], ids=str)
def test_unsupported_preprocessing_of_open_clip_is_refused(prepared, wants):
    with pytest.raises(UserError, match=r"prepares images of size .* with resize_mode .*; expected a square") as caught:
        CLIPScore(architecture=prepared(**wants)).load()
    assert "\n" not in str(caught.value)


def test_the_centre_is_torchvisions_where_the_authors_use_it(tiny_clip, tiny_head):
    """Of 32 x 47 pixels, torchvision's crop starts at column 8, transformers' at 7."""
    images = pictures(4, 32, 47)
    assert torch.equal(fit_square(images, 32), images[..., 7:39])
    assert torch.equal(fit_square(images, 32, rounded=True), images[..., 8:40])
    aesthetic, clip = Aesthetic(tiny_clip, tiny_head), CLIPScore(tiny_clip)
    assert torch.equal(aesthetic.score(images, PROMPTS), aesthetic.score(images[..., 8:40], PROMPTS))
    assert torch.equal(clip.score(images, PROMPTS), clip.score(images[..., 7:39], PROMPTS))


def test_a_revision_of_an_open_clip_is_refused():
    with pytest.raises(UserError, match=r"revision='main' is for models of transformers; open_clip loads the latest"):
        CLIPScore("openai", "ViT-B-32", revision="main")


@pytest.mark.parametrize("architecture", ["ViT-B-32", "hf-hub:owner/absent"])
def test_local_files_only_keeps_open_clip_from_the_network(monkeypatch, architecture):
    import huggingface_hub.constants
    import open_clip

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    with pytest.raises(UserError, match=f"'{architecture}' of open_clip cannot be loaded") as caught:
        CLIPScore("laion2b_s34b_b79k", architecture, local_files_only=True).load()
    assert "\n" not in str(caught.value)
    assert asked == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": "https://elsewhere"})
    with pytest.raises(UserError, match="local_files_only cannot be kept; give a weights file"):
        CLIPScore("laion2b_s34b_b79k", "ViT-B-32", local_files_only=True).load()


def test_hps_loads_its_weights_over_the_architecture(tiny_open_clip, tmp_path):
    """The published file nests the state dict under a key, and some copies prefix every name."""
    weights = torch.load(tiny_open_clip.removeprefix("local-dir:") + "/open_clip_pytorch_model.bin", weights_only=True)
    for name, wrapped in {
        "hps.pt": {"epoch": 3, "state_dict": weights},
        "parallel.pt": {"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}},
    }.items():
        torch.save(wrapped, tmp_path / name)
        reward = HPSv2(str(tmp_path / name), "tiny-open-clip")
        same = CLIPScore(architecture=tiny_open_clip)
        assert torch.equal(reward.score(pictures(4), PROMPTS), same.score(pictures(4), PROMPTS))


def test_open_clip_lists_the_known_models(tiny_open_clip):
    with pytest.raises(UserError, match="open_clip has no model 'ViT-Z-99'"):
        OpenClipModel("ViT-Z-99", "openai")
    with pytest.raises(UserError, match=r"has no weights 'mine' for ViT-B-32; known: openai"):
        OpenClipModel("ViT-B-32", "mine")


# ---- missing and mismatched weights


def test_missing_weights_are_named_before_anything_is_scored(tiny_clip, tmp_path):
    with pytest.raises(UserError, match=r"Aesthetic: there is no file '.*nowhere\.pth'"):
        Aesthetic(tiny_clip, str(tmp_path / "nowhere.pth")).load()
    with pytest.raises(UserError, match=r"HPSv2: .*downloads are off"):
        HPSv2(local_files_only=True).load()
    with pytest.raises(UserError, match=r"PickScore: pretrained='owner/absent' cannot be loaded"):
        PickScore("owner/absent", local_files_only=True).load()


def test_weights_of_another_architecture_are_refused(tiny_clip, tiny_head, tmp_path):
    torch.save(AestheticHead(16).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        UserError, match=r"another architecture: 1 names differ, first layers\.0\.weight \(there \[1024, 16\]"
    ):
        Aesthetic(tiny_clip, str(tmp_path / "wide.pth")).load()
    with pytest.raises(UserError, match=r"another architecture"):
        HPSv2(tiny_head, "tiny-open-clip").load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_model.post_layernorm.weight", "lacks 1 weights of CLIP.*, first vision_model.post_layernorm.weight"),
        ("visual_projection.weight", "lacks 1 weights of CLIP.*, first visual_projection.weight"),
    ],
)
def test_a_clip_that_lacks_weights_is_refused(tiny_clip, tiny_head, tmp_path, name, message):
    """Transformers would initialise the missing weights at random and print a report."""
    for path in Path(tiny_clip).iterdir():
        (tmp_path / path.name).symlink_to(path)
    state = load_file(tmp_path / "model.safetensors")
    del state[name]
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    folder = str(tmp_path)
    for reward in (CLIPScore(folder), PickScore(folder, processor=None), Aesthetic(folder, tiny_head)):
        with pytest.raises(UserError, match=message) as caught:
            reward.load()
        assert "\n" not in str(caught.value)


def test_code_in_a_weights_file_is_not_run(tiny_clip, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"layers.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        Aesthetic(tiny_clip, str(tmp_path / "trap.pth")).load()
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "list.pth").write_bytes(b"no zip, no pickle")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path / "list.pth")


def test_weights_are_read_at_the_first_score_and_once(tiny_clip, tiny_head, monkeypatch):
    reads = []
    reward = Aesthetic(tiny_clip, tiny_head)
    monkeypatch.setattr(Aesthetic, "read", lambda self, read=Aesthetic.read: reads.append(1) or read(self))
    assert not list(reward.parameters())
    reward.to(torch.float64)
    reward.score(pictures(1), PROMPTS[:1])
    reward.score(pictures(1), PROMPTS[:1])
    assert len(reads) == 1
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float64}


def test_weights_read_in_inference_mode_serve_gradients_later(tiny_clip, tiny_head):
    reward = Aesthetic(tiny_clip, tiny_head)
    with torch.inference_mode():
        reward.score(pictures(1), PROMPTS[:1])
    images = pictures(1).requires_grad_()
    reward(images, PROMPTS[:1]).sum().backward()
    assert images.grad.abs().max() > 0


def test_a_hub_file_has_a_name_of_three_parts(tmp_path):
    (tmp_path / "head.pth").write_bytes(b"x")
    assert find_file(str(tmp_path / "head.pth")) == tmp_path / "head.pth"
    with pytest.raises(UserError, match="expected a path, or owner/name/file"):
        find_file("owner/name")


# ---- pixels


def test_colorfulness_is_hasler_and_suesstrunks():
    image = pictures(1, 24, 40)
    red, green, blue = (255 * image[0].double().numpy()).reshape(3, -1)
    rg, yb = red - green, 0.5 * (red + green) - blue
    expected = math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())
    assert float(Colorfulness().score(image, [""])) == pytest.approx(expected, rel=1e-5)
    assert float(Colorfulness().score(torch.full((1, 3, 8, 8), 0.5), [""])) == pytest.approx(0, abs=1e-4)


def test_sharpness_is_the_variance_of_the_laplacian():
    image = pictures(1, 24, 40)
    luma = 255 * np.tensordot([0.299, 0.587, 0.114], image[0].double().numpy(), 1)
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    assert float(Sharpness().score(image, [""])) == pytest.approx(laplacian.var(), rel=1e-5)
    checkers = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    assert float(Sharpness().score(checkers.expand(1, 3, 16, 16).float(), [""])) == pytest.approx(1020**2, rel=1e-5)


def test_brightness_of_the_primaries_is_their_luma():
    primaries = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    assert Brightness().score(primaries, [""] * 3).tolist() == pytest.approx([0.299, 0.587, 0.114])


# ---- low precision


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_numbers_of_a_function_keep_their_digits(half_by_default):
    numbers = [0.123456789, 20.123456]
    ddpo = (torch.tensor(numbers, dtype=torch.float64), {"metadata": 1})
    for answer in (numbers, np.array(numbers), torch.tensor(numbers, dtype=torch.float64), ddpo, (numbers, {})):
        scores = FunctionReward(lambda images, prompts, answer=answer: answer).score(pictures(2), PROMPTS[:2])
        assert scores.tolist() == pytest.approx(numbers, rel=1e-7)
    alone = iter([numbers[0], (torch.tensor(numbers[1], dtype=torch.float64), {})])
    scores = FunctionReward(lambda image, prompt: next(alone), one_by_one=True).score(pictures(2), PROMPTS[:2])
    assert scores.tolist() == pytest.approx(numbers, rel=1e-7)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("answer", [None, "good", {"score": 1.0}, ([1.0], "x")])
def test_a_function_that_returns_no_numbers_is_told_what_it_returned(answer, one_by_one):
    reward = FunctionReward(lambda *given: answer, one_by_one)
    expected = "one number" if one_by_one else "one number per image"
    kind = type(answer).__name__
    with pytest.raises(RewardError, match=re.escape(f"returned {answer!r}, a {kind}; expected {expected}")):
        reward.score(pictures(2), PROMPTS[:2])


def test_sharpness_is_as_exact_under_autocast():
    images = pictures(4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = Sharpness().score(images, PROMPTS)
    torch.testing.assert_close(scores, Sharpness().score(images, PROMPTS), rtol=1e-6, atol=0)


def test_the_scale_of_pick_score_keeps_its_digits(tiny_clip):
    """Rounding the logit scale of 4.605 to bfloat16 would change all scores by 1 %."""
    expected = float(CLIPModel.from_pretrained(tiny_clip).logit_scale.detach().double().exp())
    for load_first in (True, False):
        reward = PickScore(tiny_clip, processor=None)
        if load_first:
            reward.load()
        reward.to(torch.bfloat16)
        images = pictures(4)
        cosines = (reward.network.image_features(images) * reward.network.text_features(PROMPTS)).sum(-1)
        torch.testing.assert_close(reward.score(images, PROMPTS), expected * cosines, rtol=1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("load_first", [False, True])
def test_the_aesthetic_head_separates_close_embeddings_in_half_precision(tiny_clip, tiny_head, load_first, autocast):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 8, generator=generator) + 0.05 * torch.randn(20, 8, generator=generator)
    embeddings = embeddings.bfloat16()
    expected = AestheticHead(8)
    expected.load_state_dict(torch.load(tiny_head, weights_only=True))
    reward = Aesthetic(tiny_clip, tiny_head)
    if load_first:
        reward.load()
    reward.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = reward.network.head(embeddings)
    assert reward.network.clip.dtype == torch.bfloat16
    assert len(set(scores.tolist())) == 20
    with torch.no_grad():
        torch.testing.assert_close(scores, expected.eval()(embeddings.float()), rtol=1e-6, atol=1e-6)


# ---- functions


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "NUMBER = 3\n"
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n"
        "def width(image, prompt):\n    return image.width + len(prompt)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = FunctionReward("my_scores.redness")
    assert reward.name == "redness"
    torch.testing.assert_close(reward.score(pictures(4), PROMPTS), pictures(4)[:, 0].mean((1, 2)))
    alone = FunctionReward("my_scores.width", one_by_one=True)
    assert alone.score(pictures(2, 30, 50), ["a", "abc"]).tolist() == [51, 53]
    for name, message in {
        "my_scores": "is a module; expected a function",
        "my_scores.missing": "has no attribute 'missing'",
        "absent_file.f": "cannot be imported: No module named 'absent_file'",
        "my_scores.NUMBER": "is a int; expected a function",
    }.items():
        with pytest.raises(UserError, match=message):
            FunctionReward(name)
    sys.modules.pop("my_scores")


def test_an_exception_of_a_reward_is_one_line_with_its_name():
    def broken(images, prompts):
        raise KeyError("colour\nof the sky")

    with pytest.raises(RewardError, match=r"^reward broken failed with KeyError: 'colour\\nof the sky'$"):
        FunctionReward(broken).score(pictures(1), [""])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("could not create a primitive"),
        MemoryError("std::bad_alloc"),
        RuntimeError("CUDA error: device-side assert triggered"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_device_errors_are_not_reward_errors(error):
    """Out-of-memory errors go to the chunker; device errors affect all prompts, so none is skipped."""

    def hungry(images, prompts):
        raise error

    with pytest.raises(type(error)) as caught:
        FunctionReward(hungry).score(pictures(1), [""])
    assert not isinstance(caught.value, RewardError)
    prompts = [Prompt(k, text, None, None, {}) for k, text in enumerate("ab")]
    with pytest.raises(type(error)):
        predict_or_skip(
            lambda batch: FunctionReward(hungry).score(pictures(len(batch)), [""]), prompts, is_device_failure
        )


# ---- rewards of rewards


def test_a_weighted_sum_adds_up():
    images, parts = pictures(4), (Compressibility(), Brightness())
    total = WeightedSum(list(parts), [2, -3]).score(images, PROMPTS)
    expected = 2 * parts[0].score(images, PROMPTS) - 3 * parts[1].score(images, PROMPTS)
    torch.testing.assert_close(total, expected)
    assert WeightedSum([Brightness(), Brightness()], [2, -3]).range == (-3.0, 2.0)
    for weights in ([1.0], [1.0, math.nan], []):
        with pytest.raises(ValueError, match="one finite number per reward"):
            WeightedSum(list(parts), weights)
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedSum([])


def test_z_scores_have_mean_0_and_std_1_on_their_own_sample(tmp_path):
    images, reward = pictures(4), Brightness()
    raw = reward.score(images, PROMPTS).double()
    summary = {"sampler": "Unguided", "rewards": {"Brightness": {"mean": float(raw.mean()), "std": float(raw.std())}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for source in (tmp_path, tmp_path / "summary.json"):
        scores = ZScored(Brightness(), statistics=str(source)).score(images, PROMPTS)
        assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
        assert float(scores.std()) == pytest.approx(1, abs=1e-5)


def test_z_scores_refuse_unusable_statistics(tmp_path):
    for arguments in ({}, {"mean": 1.0}, {"mean": 1.0, "std": 1.0, "statistics": "x"}, {"std": 1.0, "statistics": "x"}):
        with pytest.raises(ValueError, match="give statistics, or mean and std"):
            ZScored(Brightness(), **arguments)
    with pytest.raises(ValueError, match="std must be > 0, got 0"):
        ZScored(Brightness(), mean=0, std=0)
    with pytest.raises(UserError, match="is not the summary of a run"):
        ZScored(Brightness(), statistics=str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"sampler": "SVDD", "rewards": {"A": {"mean": 0, "std": 1}}}))
    with pytest.raises(UserError, match=r"has A, not Brightness; measure it: --model.eval_rewards\+=Brightness"):
        ZScored(Brightness(), statistics=str(tmp_path))
    (tmp_path / "summary.json").write_text(
        json.dumps({"sampler": "SVDD", "rewards": {"Brightness": {"mean": 0, "std": 1}}})
    )
    with pytest.warns(UserWarning, match="guided by SVDD"):
        ZScored(Brightness(), statistics=str(tmp_path))


def test_a_threshold_penalises_the_shortfall():
    levels = torch.tensor([0.1, 0.4, 0.6, 0.9])[:, None, None, None].expand(4, 3, 4, 4)
    scores = Threshold(Brightness(), at_least=0.3, at_most=0.7).score(levels, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor([-0.2, 0, 0, -0.2]), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="got neither"):
        Threshold(Brightness())
    with pytest.raises(ValueError, match="must not exceed"):
        Threshold(Brightness(), at_least=1, at_most=0)


def test_a_sum_loads_the_weights_of_its_parts(tiny_clip):
    whole = WeightedSum([ZScored(CLIPScore(tiny_clip), 0, 1), Brightness()])
    assert not list(whole.parameters())
    whole.load()
    assert list(whole.parameters())
