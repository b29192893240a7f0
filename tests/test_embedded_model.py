"""The embedded model: complete, small, loadable by diffusers, and responsive to guidance."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel

from svdd import GuidedDiffusion, StableDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided

ASSETS = Path(str(files("svdd") / "assets"))
PROMPTS = ["red apple on a yellow background", "penguin", "rocket on a black background", "heart"]


def test_it_is_under_32_megabytes_and_holds_no_pickle():
    paths = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 32e6
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


def test_it_shares_the_text_tower_of_its_clip_but_not_of_the_judge():
    text = CLIPTextModel.from_pretrained(ASSETS / "emoji-sd" / "text_encoder").state_dict()
    clip = CLIPModel.from_pretrained(ASSETS / "emoji-clip")
    own = {key.removeprefix("text_model."): value for key, value in text.items()}
    assert all(torch.equal(own[key], value) for key, value in clip.text_model.state_dict().items())
    judge = CLIPModel.from_pretrained(ASSETS / "emoji-judge")
    assert judge.config.vision_config.patch_size != clip.config.vision_config.patch_size
    assert judge.config.text_config.hidden_size != clip.config.text_config.hidden_size


@pytest.mark.parametrize("pretrained", ["emoji", "emoji-judge"])
def test_images_score_higher_with_their_own_prompt(pretrained):
    model = GuidedDiffusion(CLIPScore(pretrained), StableDiffusion("emoji", 20, 3.0), Unguided())
    images, own = model.sample(PROMPTS, seed=0)
    other = model.reward.score(images, PROMPTS[1:] + PROMPTS[:1])
    assert own.mean() > other.mean() + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("reward", [Compressibility(), CLIPScore()], ids=["jpeg", "clip"])
def test_svdd_increases_its_reward(reward):
    diffusion = StableDiffusion("emoji", 15, 3.0)
    _, plain = GuidedDiffusion(reward, diffusion, Unguided()).sample(PROMPTS, seed=0)
    _, guided = GuidedDiffusion(reward, diffusion, SVDD(num_candidates=6)).sample(PROMPTS, seed=0)
    assert (guided > plain).sum() >= 3
    assert guided.mean() > plain.mean()
