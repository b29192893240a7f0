"""What SDXL and PixArt-Sigma have of their own, beside `test_families.py`."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from svdd import UserError
from svdd.diffusion.auto import from_pipeline
from svdd.diffusion.pixart_sigma import PixArtSigma
from svdd.diffusion.stable_diffusion_xl import StableDiffusionXL
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import pixart_sigma, sdxl

UNBINNED = {"use_resolution_binning": False}


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> str:
    return sdxl.save(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory) -> str:
    return pixart_sigma.save(tmp_path_factory.mktemp("pixart"))


def edited(folder: str, to: Path, file: str, **changes: object) -> str:
    shutil.copytree(folder, to / "model")
    path = to / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(to / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "has a UNet with 9 input channels and latents with 4"),
        ({"addition_embed_type": None}, "addition_embed_type=None; expected 'text_time'"),
        ({"projection_class_embeddings_input_dim": 5 * 8 + 12}, "reads 5 numbers besides texts; expected 6 (a refiner"),
        ({"cross_attention_dim": 24}, "has a UNet for text states of width 24 and text encoders of 16 and 24"),
    ],
)
def test_a_unet_of_another_kind_is_refused_before_weights_are_read(xl, tmp_path, changes, message):
    folder = edited(xl, tmp_path, "unet/config.json", **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        StableDiffusionXL.examine({"pretrained": folder})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_additional_conditions": True}, "reads the picture's size, as PixArt-Alpha's"),
        ({"use_additional_conditions": None, "sample_size": 128}, "reads the picture's size, as PixArt-Alpha's"),
        ({"in_channels": 8}, "has a transformer with 8 input channels and latents with 4"),
    ],
)
def test_a_transformer_of_another_kind_is_refused_before_weights_are_read(pixart, tmp_path, changes, message):
    folder = edited(pixart, tmp_path, "transformer/config.json", **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        PixArtSigma.examine({"pretrained": folder})


def test_a_transformer_under_its_first_class_name_loads(pixart, tmp_path):
    """Published folders name Transformer2DModel, which diffusers replaces by PixArtTransformer2DModel."""
    folder = edited(pixart, tmp_path, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    path = Path(folder, "transformer", "config.json")
    path.write_text(path.read_text().replace('"PixArtTransformer2DModel"', '"Transformer2DModel"'))
    model = PixArtSigma(folder, 2)
    assert type(model.transformer).__name__ == "PixArtTransformer2DModel"
    assert model.scheduler == "euler_ancestral"


def test_a_lora_for_a_pipeline_that_takes_none_is_refused(pixart):
    with pytest.raises(UserError, match="diffusers loads no LoRA into a PixArtSigmaPipeline"):
        PixArtSigma(pixart, 2, lora=pixart)


@torch.no_grad()
def test_embeddings_are_zeros_only_without_a_negative_prompt(xl, tmp_path):
    """As with `negative_prompt=None` in the pipeline; an empty text is a text."""
    model = StableDiffusionXL(xl, 2)
    _, negative = model.encode(["a", "b", "c"], [None, "", "x"])
    for part in negative.values():
        assert [bool(row.any()) for row in part] == [False, True, True]
    everywhere = StableDiffusionXL(xl, 2, negative_prompt="x").encode(["a"], [None])[1]
    assert torch.equal(everywhere["pooled"][0], model.encode(["x"], [None])[0]["pooled"][0])
    folder = edited(xl, tmp_path, "model_index.json", force_zeros_for_empty_prompt=False)
    (_, encoded) = StableDiffusionXL(folder, 2).encode(["a"], [None])
    torch.testing.assert_close(encoded["states"][0], negative["states"][1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_decodes_in_float32(xl, tmp_path, upcast, dtype):
    """`force_upcast`: true in SDXL's own autoencoder, false in the one repaired for half precision."""
    folder = edited(xl, tmp_path, "vae/config.json", force_upcast=upcast)
    model = StableDiffusionXL(folder, 2).to(dtype)  # as Lightning does for --trainer.precision bf16-true
    seen = []
    model.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images = model.decode(torch.randn(1, 4, 8, 8, dtype=dtype))
    assert model.dtype == model.unet.dtype == model.text_encoder.dtype == dtype
    overflows = upcast and dtype == torch.float16  # as in the pipeline, whose autoencoder stays in bfloat16
    assert seen == [torch.float32 if overflows else dtype]
    assert images.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(("kind", "dtype"), [("XL", "float16"), ("PixArt", "float16"), ("PixArt", "bfloat16")])
def test_pictures_in_half_precision_equal_the_pipelines(xl, pixart, kind, dtype):
    """Also after `to`, which leaves positions and, in float16, some layers of T5 and the autoencoder in float32."""
    folder, family, options = (xl, StableDiffusionXL, {}) if kind == "XL" else (pixart, PixArtSigma, UNBINNED)
    pipe = getattr(diffusers, family.pipeline).from_pretrained(folder, dtype=getattr(torch, dtype))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipe(["panda", "a red apple"], num_inference_steps=3, generator=generators, output_type="np", **options)
    for read in (dtype, "float32"):
        model = family(folder, 3, scheduler="ddim", eta=0.0, dtype=read, parity=True).to(getattr(torch, dtype))
        images = Unguided()(Start(model, ["panda", "a red apple"], [3, 4]), PosteriorMean()).images
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected.images)


@torch.no_grad()
def test_a_pipeline_object_in_half_precision_keeps_its_autoencoder(xl):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl, dtype=torch.float16)
    model = from_pipeline(pipe, num_inference_steps=2, scheduler="euler", eta=0.0).to(torch.device("cpu"))
    assert (model.vae.dtype, pipe.vae.dtype) == (torch.float32, torch.float16)
    images = Unguided()(Start(model, ["panda"], [3]), PosteriorMean()).images
    expected = pipe(["panda"], num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected.images)


@torch.no_grad()
def test_prompt_features_are_the_pooled_text_and_the_mean_over_real_tokens(xl, pixart):
    for model in (StableDiffusionXL(xl, 2), PixArtSigma(pixart, 2)):
        conditioning = model.encode(["panda", "a red apple"], [None, None])
        found = model.prompt_features(conditioning)
        assert found.shape == (2, model.prompt_features_size)
        assert not torch.equal(*found)
    states, mask = conditioning[0]["states"], conditioning[0]["mask"]
    assert mask.sum(1).tolist() == [7, 13]  # a token for each letter, those of word starts and of the end
    torch.testing.assert_close(found[0], states[0, :7].mean(0))


@torch.no_grad()
def test_texts_are_put_into_lower_case_and_cut_off_after_300_tokens(pixart):
    model = PixArtSigma(pixart, 2)
    with pytest.warns(UserWarning, match="a prompt has 302 tokens and the text encoder reads 300"):
        states = model.encode([" Red APPLE", "red apple", "x" * 300], [None] * 3)[0]["states"]
    assert torch.equal(states[0], states[1])


def test_settings_of_the_scheduler_replace_the_saved_ones(xl):
    model = StableDiffusionXL(xl, 4, scheduler_options={"timestep_spacing": "trailing"})
    assert model.kernel.timesteps.tolist() == [999, 749, 499, 249]
    assert model.identity["scheduler_options"] == {"timestep_spacing": "trailing"}
    assert "scheduler_options" not in StableDiffusionXL(xl, 4).identity
    for options, message in (
        ({"timestep_spacin": "x"}, "DDIMScheduler has no setting 'timestep_spacin'; did you mean 'timestep_spacing'?"),
        ({"timestep_spacing": "x"}, "timestep_spacing must be one of leading, trailing, linspace, got 'x'"),
        ({"beta_start": "x"}, "scheduler_options: beta_start must be a number, got 'x'"),
        ({"beta_start": True}, "scheduler_options: beta_start must be a number, got True"),
        ({"clip_sample": "yes"}, "scheduler_options: clip_sample must be true or false, got 'yes'"),
        ({"timestep_spacing": 1}, "scheduler_options: timestep_spacing must be text, got 1"),
        ({"trained_betas": "x"}, "DDIMScheduler cannot take these settings: "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            StableDiffusionXL(xl, 4, scheduler_options=options)


@torch.no_grad()
def test_a_picture_has_the_size_that_was_asked_for_and_latents_of_a_trained_size(tmp_path):
    model = PixArtSigma(pixart_sigma.save(tmp_path, 32), 2, height=150, width=301)
    assert model.latent_shape == (4, 22, 44)  # 176 x 352 pixels, whose aspect ratio is 0.5
    assert model.decode(torch.randn(1, 4, 22, 44)).shape == (1, 3, 150, 301)
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 40"):
        PixArtSigma(pixart_sigma.save(tmp_path / "one"), 2, height=40)
