"""The embedded models: complete, small, loadable by diffusers, and responsive to guidance."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from svdd import GuidedDiffusion, StableDiffusion, UserError
from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

ASSETS = Path(str(files("svdd") / "assets"))
PROMPTS = ["red apple on a yellow background", "penguin", "rocket on a black background", "heart"]


def test_emoji_flow_is_under_16_megabytes_the_others_under_32_and_none_holds_a_pickle():
    paths = [path for path in ASSETS.rglob("*") if path.is_file()]
    flow = sum(path.stat().st_size for path in paths if "emoji-flow" in path.parts)
    assert 0 < flow < 16e6
    assert sum(path.stat().st_size for path in paths) - flow < 32e6
    assert {path.suffix for path in paths} <= {".json", ".safetensors", ".md", ".txt", ".py", ".pyc"}


def test_diffusers_loads_it_unchanged():
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd")
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    image = pipeline("red apple", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_diffusers_loads_the_flow_model_and_draws_as_we_do():
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # a pipeline that was saved without T5 needs both
    pipeline = StableDiffusion3Pipeline.from_pretrained(ASSETS / "emoji-flow", **absent)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == pipeline.text_encoder_2.dtype == torch.float32
    ours = AutoDiffusion("emoji-flow", 3, 2.0, eta=0.0, parity=True)
    assert isinstance(ours, StableDiffusion3)
    images = Unguided()(Start(ours, ["penguin"], [0]), PosteriorMean()).images
    own = pipeline(
        "penguin",
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=0,
        generator=[torch.Generator().manual_seed(0)],
        output_type="pt",
    ).images
    assert torch.equal(images, own)


def test_a_class_for_other_models_refuses_an_embedded_one_before_anything_is_loaded():
    with pytest.raises(UserError, match="'emoji-flow' is a StableDiffusion3Pipeline; this class takes"):
        StableDiffusion.examine({"pretrained": "emoji-flow"})
    AutoDiffusion.examine({"pretrained": "emoji-flow", "max_sequence_length": 0})


@pytest.mark.parametrize(
    ("pipeline", "kind"), [("emoji-sd", CLIPTextModel), ("emoji-flow", CLIPTextModelWithProjection)]
)
def test_they_share_the_text_tower_of_the_clip_but_not_of_the_judge(pipeline, kind):
    text = kind.from_pretrained(ASSETS / pipeline / "text_encoder").state_dict()
    clip = CLIPModel.from_pretrained(ASSETS / "emoji-clip")
    own = {key.removeprefix("text_model."): value for key, value in text.items()}
    assert all(torch.equal(own[key], value) for key, value in clip.text_model.state_dict().items())
    judge = CLIPModel.from_pretrained(ASSETS / "emoji-judge")
    assert judge.config.vision_config.patch_size != clip.config.vision_config.patch_size
    assert judge.config.text_config.hidden_size != clip.config.text_config.hidden_size


@pytest.mark.parametrize(
    ("pretrained", "clip", "least"),
    [("emoji", "emoji", 0.7), ("emoji", "emoji-judge", 0.7), ("emoji-flow", "emoji-judge", 0.8)],
)
def test_images_score_higher_with_their_own_prompt(pretrained, clip, least):
    model = GuidedDiffusion(CLIPScore(clip), AutoDiffusion(pretrained, 20, 3.0, eta=0.0), Unguided())
    images, own = model.sample(PROMPTS, seed=0)
    other = model.reward.score(images, PROMPTS[1:] + PROMPTS[:1])
    assert own.mean() > least
    assert own.mean() > other.mean() + 0.4


@pytest.mark.slow
@pytest.mark.parametrize("reward", [Compressibility(), CLIPScore()], ids=["jpeg", "clip"])
def test_svdd_increases_its_reward(reward):
    diffusion = StableDiffusion("emoji", 15, 3.0)
    _, plain = GuidedDiffusion(reward, diffusion, Unguided()).sample(PROMPTS, seed=0)
    _, guided = GuidedDiffusion(reward, diffusion, SVDD(num_candidates=6)).sample(PROMPTS, seed=0)
    assert (guided > plain).sum() >= 3
    assert guided.mean() > plain.mean()
