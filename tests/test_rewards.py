"""All rewards fulfil one contract; the numbers of each are checked against an independent computation."""

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn import ModuleList
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from svdd import RewardError, UserError
from svdd.rewards.aesthetic import Aesthetic
from svdd.rewards.base import Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.colorfulness import Colorfulness
from svdd.rewards.function import FunctionReward
from svdd.rewards.hps_v2 import HPSv2
from svdd.rewards.jpeg import Compressibility, Incompressibility
from svdd.rewards.pick_score import PickScore
from svdd.rewards.sharpness import Sharpness
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.rewards.z_scored import ZScored

PROMPTS = ["a red apple", "blue car", "panda", "a house, on a hill!"]


def mean_red(images, prompts):
    return images[:, 0].mean((1, 2))


TESTED = {
    "Compressibility": lambda clip, open_clip, head: Compressibility(),
    "Incompressibility": lambda clip, open_clip, head: Incompressibility(),
    "Colorfulness": lambda clip, open_clip, head: Colorfulness(),
    "Sharpness": lambda clip, open_clip, head: Sharpness(),
    "Brightness": lambda clip, open_clip, head: Brightness(),
    "CLIPScore": lambda clip, open_clip, head: CLIPScore(clip),
    "CLIPScore of open_clip": lambda clip, open_clip, head: CLIPScore(architecture=open_clip),
    "PickScore": lambda clip, open_clip, head: PickScore(clip, processor=None),
    "HPSv2": lambda clip, open_clip, head: HPSv2(
        open_clip.removeprefix("local-dir:") + "/open_clip_pytorch_model.bin", "tiny-open-clip"
    ),
    "Aesthetic": lambda clip, open_clip, head: Aesthetic(clip, head),
    "FunctionReward": lambda clip, open_clip, head: FunctionReward(mean_red, differentiable=True),
    "FunctionReward, one by one": lambda clip, open_clip, head: FunctionReward(
        lambda image, prompt: np.asarray(image).mean(), one_by_one=True
    ),
    "WeightedSum": lambda clip, open_clip, head: WeightedSum([CLIPScore(clip), Brightness()], [2.0, -0.5]),
    "WeightedSum without gradient": lambda clip, open_clip, head: WeightedSum([Compressibility(), Brightness()]),
    "ZScored": lambda clip, open_clip, head: ZScored(Brightness(), mean=0.4, std=0.1),
    "Threshold": lambda clip, open_clip, head: Threshold(Brightness(), at_least=0.7),
}


def pictures(count: int, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Returns smooth to noisy images whose pixels are multiples of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    noise = torch.rand(count, 3, height, width, generator=generator) - 0.5
    strength = torch.linspace(0, 0.6, count).view(-1, 1, 1, 1)
    return ((smooth + strength * noise).clamp(0, 1) * 255).round() / 255


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


# ---- the contract


@pytest.fixture(scope="module", params=TESTED)
def reward(request, tiny_clip, tiny_open_clip, tiny_head) -> Reward:
    return TESTED[request.param](tiny_clip, tiny_open_clip, tiny_head)


@pytest.mark.parametrize("count", [1, 4])
def test_one_finite_float32_per_image(reward, count):
    scores = reward.score(pictures(count), PROMPTS[:count])
    assert scores.shape == (count,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_a_score_belongs_to_its_row(reward):
    images, order = pictures(4), [2, 0, 3, 1]
    scores = reward.score(images, PROMPTS)
    assert len(set(scores.tolist())) == 4
    permuted = reward.score(images[order], [PROMPTS[k] for k in order])
    torch.testing.assert_close(permuted, scores[order], rtol=0, atol=1e-6)
    for k in range(4):
        alone = reward.score(images[k : k + 1], PROMPTS[k : k + 1])
        torch.testing.assert_close(alone, scores[k : k + 1], rtol=0, atol=1e-6)


def test_images_are_left_alone(reward):
    images = pictures(2)
    before = images.clone()
    reward.score(images, PROMPTS[:2])
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_type_is_accepted(reward, dtype):
    images = pictures(2)
    scores = reward.score(images.to(dtype), PROMPTS[:2])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward.score(images, PROMPTS[:2]), rtol=0.1, atol=0.02)


def test_non_square_images_are_accepted(reward):
    assert reward.score(pictures(2, 24, 56), PROMPTS[:2]).shape == (2,)


def test_non_contiguous_images_are_accepted(reward):
    images = pictures(4)
    part = images.permute(0, 1, 3, 2)[::2]
    torch.testing.assert_close(reward.score(part, PROMPTS[::2]), reward.score(part.contiguous(), PROMPTS[::2]))


def test_the_gradient_is_the_slope(reward):
    if not reward.differentiable:
        images = pictures(1).requires_grad_()
        assert not reward(images, PROMPTS[:1]).requires_grad
        return
    images = pictures(2, 36, 44).clamp(0.2, 0.8)
    images.requires_grad_()
    scores = reward(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).min() > 0
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 0.05
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


def test_scores_lie_in_the_stated_range(reward):
    low, high = reward.range
    scores = reward.score(
        torch.cat([pictures(4), torch.zeros(1, 3, 40, 40), torch.ones(1, 3, 40, 40)]), PROMPTS[:3] * 2
    )
    assert scores.min() >= low - 1e-5
    assert scores.max() <= high + 1e-5


def test_a_module_of_half_precision_scores_nearly_the_same(reward):
    exact = reward.score(pictures(4), PROMPTS)
    half = copy.deepcopy(reward).to(torch.bfloat16)
    scores = half.score(pictures(4).bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.05)


def test_no_parameter_is_trainable(reward):
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules() if not isinstance(module, Reward | ModuleList))


# ---- score() enforces the contract


class Returns(Reward):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images, prompts):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], r"reward Returns returned a list; expected a tensor of shape \[2\]"),
        (1.0, "returned a float"),
        (torch.zeros(2, 1), r"returned shape \[2, 1\]"),
        (torch.zeros(3), r"returned shape \[3\]"),
        (torch.tensor(1.0), r"returned shape \[\]"),
        (torch.tensor([0, math.nan]), "NaN or infinity for 1 of 2 images, first for the prompt 'blue car'"),
        (torch.tensor([math.inf, -math.inf]), "NaN or infinity for 2 of 2 images, first for the prompt 'a red apple'"),
    ],
)
def test_invalid_scores_are_refused(answer, message):
    with pytest.raises(RewardError, match=message):
        Returns(answer).score(pictures(2), PROMPTS[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_scores_of_any_type_become_float32(dtype):
    scores = Returns(torch.tensor([1, 2], dtype=dtype)).score(pictures(2), PROMPTS[:2])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.0]


# ---- JPEG


@pytest.mark.parametrize("size", [(40, 40), (33, 57)])
def test_kilobytes_are_those_of_the_saved_file(size, tmp_path):
    images = pictures(4, *size)
    expected = []
    for k, picture in enumerate(as_pil(images)):
        path = tmp_path / f"{k}.jpg"
        picture.save(path, quality=95)
        expected.append(path.stat().st_size / 1000)
    torch.testing.assert_close(Incompressibility().score(images, PROMPTS), torch.tensor(expected), rtol=0, atol=0)
    assert torch.equal(Compressibility().score(images, PROMPTS), -Incompressibility().score(images, PROMPTS))
    assert expected == sorted(expected)  # more noise, larger file


def test_a_file_size_is_positive():
    assert (Compressibility().range, Incompressibility().range) == ((-math.inf, 0.0), (0.0, math.inf))
    assert WeightedSum([Compressibility(), Brightness()], [-1, 2]).range == (0.0, math.inf)


def test_pixels_are_rounded_and_clamped():
    images = pictures(1)
    blurred = images + 0.4 / 255 * torch.sign(torch.rand_like(images) - 0.5)
    reward = Compressibility()
    assert torch.equal(reward.score(blurred, PROMPTS[:1]), reward.score(images, PROMPTS[:1]))
    buffer = io.BytesIO()
    as_pil((2 * images - 0.5).clamp(0, 1))[0].save(buffer, "JPEG", quality=95)
    assert float(reward.score(2 * images - 0.5, PROMPTS[:1])) == pytest.approx(-len(buffer.getvalue()) / 1000)


# ---- CLIP


def within_gamut(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose resizing does not overshoot [0, 1]: the processor clamps between its two passes, svdd after both."""
    return ((pictures(count, height, width) * 0.4 + 0.3) * 255).round() / 255


def by_transformers(folder: str, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the processor's pixels, and the model's cosines of all pairs, [images, prompts]."""
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder))
    inputs = processor(text=prompts, images=as_pil(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder).eval()(**inputs)
    return inputs.pixel_values, F.cosine_similarity(output.image_embeds[:, None], output.text_embeds[None], dim=-1)


@pytest.mark.parametrize(
    "size", [(32, 32), (32, 47), (64, 64), (40, 40), (48, 96), (100, 37), (20, 20), (33, 65), (47, 33)]
)
def test_clip_score_equals_transformers(tiny_clip, size):
    """The processor rounds to 8 bits after each of two resizing passes: 1.2 / 255 per pixel, 1.5e-3 per score."""
    images, resized = within_gamut(4, *size), min(size) != 32
    pixels, cosines = by_transformers(tiny_clip, images, PROMPTS)
    reward = CLIPScore(tiny_clip)
    difference = (reward.network.preprocess(images) - pixels) * torch.tensor(reward.network.std)[:, None, None]
    assert difference.abs().max() < (1.2 / 255 if resized else 1e-6)
    torch.testing.assert_close(
        reward.score(images, PROMPTS), cosines.diagonal(), rtol=0, atol=1.5e-3 if resized else 1e-6
    )
    assert cosines.std() > 0.03  # 20 tolerances: the score of another pair would fail


def test_the_longer_side_is_the_processors(tiny_clip):
    images = within_gamut(1, 392, 784)
    reward, (pixels, _) = CLIPScore(tiny_clip), by_transformers(tiny_clip, images, PROMPTS[:1])
    assert (
        (reward.network.preprocess(images) - pixels) * torch.tensor(reward.network.std)[:, None, None]
    ).abs().max() < 1.2 / 255


def test_every_image_is_paired_with_its_own_prompt(tiny_clip):
    reward, image = CLIPScore(tiny_clip), pictures(1)
    one_by_one = torch.cat([reward.score(image, [prompt]) for prompt in PROMPTS])
    together = reward.score(image.repeat(4, 1, 1, 1), PROMPTS)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)
    assert len({round(score, 5) for score in together.tolist()}) == 4
    repeated = reward.score(image.repeat(3, 1, 1, 1), [PROMPTS[0], PROMPTS[2], PROMPTS[0]])
    torch.testing.assert_close(repeated, one_by_one[[0, 2, 0]], rtol=0, atol=1e-6)


def test_cached_prompts_give_the_same_scores(tiny_clip):
    warm, images = CLIPScore(tiny_clip), pictures(4)
    warm.score(images[:2], PROMPTS[:2])
    torch.testing.assert_close(warm.score(images, PROMPTS), CLIPScore(tiny_clip).score(images, PROMPTS))


def test_prompts_cached_in_inference_mode_do_not_stop_gradients(tiny_clip):
    reward, images = CLIPScore(tiny_clip), pictures(2)
    with torch.inference_mode():
        reward.score(images, PROMPTS[:2])
    reward(images.requires_grad_(), PROMPTS[:2]).sum().backward()
    assert images.grad.abs().max() > 0


def test_long_and_empty_prompts_are_scored(tiny_clip):
    assert CLIPScore(tiny_clip).score(pictures(2), ["long " * 100, ""]).isfinite().all()


def test_the_name_contains_the_clip(tiny_clip):
    assert CLIPScore(tiny_clip).name == "CLIPScore-" + tiny_clip.rsplit("/", 1)[1]


def test_a_folder_without_preprocessor_uses_openais_numbers(tiny_clip, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(f"{tiny_clip}/{name}")
    images = pictures(2)
    assert torch.equal(
        CLIPScore(str(tmp_path)).score(images, PROMPTS[:2]), CLIPScore(tiny_clip).score(images, PROMPTS[:2])
    )


def test_a_model_other_than_clip_is_refused(tmp_path, sd15):
    with pytest.raises(UserError, match=r"'.*/nowhere' is not a folder; expected `emoji`"):
        CLIPScore(str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=r"has no config\.json"):
        CLIPScore(str(tmp_path)).load()
    with pytest.raises(UserError, match="clip_text_model model; expected a CLIP"):
        CLIPScore(f"{sd15}/text_encoder").load()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="bert model; expected a CLIP"):
        CLIPScore(str(tmp_path)).load()


def test_a_clip_without_weights_is_refused_in_one_line(tiny_clip, tmp_path):
    (tmp_path / "config.json").symlink_to(f"{tiny_clip}/config.json")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        CLIPScore(str(tmp_path)).load()
    assert "\n" not in str(caught.value)
