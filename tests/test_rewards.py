"""`Reward.score` enforces the contract; JPEG sizes and CLIP scores equal an independent computation."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from svdd import RewardError, UserError
from svdd.rewards.base import Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility, Incompressibility
from svdd.rewards.weighted_sum import WeightedSum
from tests.tested_rewards import PROMPTS, as_pil, pictures

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


@pytest.mark.parametrize(("prompts", "found"), [("abc", "the text 'abc'"), (["a"], "1 prompts")])
def test_each_image_needs_a_prompt(prompts, found):
    with pytest.raises(RewardError, match=f"a list of one prompt for each of 3 images, got {found}"):
        CLIPScore().score(pictures(3), prompts)


def test_large_images_in_half_precision_are_finite():
    white = torch.ones(1, 3, 256, 256, dtype=torch.float16)  # whose sum exceeds 65504
    assert Brightness().score(white, ["a"]).tolist() == [1.0]


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
    assert WeightedSum([Brightness()], label="light").name == "WeightedSum-light"


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
