"""SD3, FLUX.1 and FLUX.2 klein: sizes, refusals and warnings; their pictures are compared in test_families.py."""

import warnings
from importlib import import_module

import numpy as np
import pytest
import torch

from svdd import UserError
from svdd.diffusion.flux import Flux
from svdd.diffusion.flux2_klein import Flux2Klein
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from tests.tiny_families import FAMILIES, FLOW
from tests.tiny_families.drawing import Reference, build, draw

CLASSES = {"sd3": StableDiffusion3, "flux": Flux, "flux2_klein": Flux2Klein}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: import_module(f"tests.tiny_families.{name}").save(tmp_path_factory.mktemp(name)) for name in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_pictures_in_bfloat16_equal_the_pipelines(kind, folders):
    """Latents keep the pipeline's precision between steps, and steps are computed in float32."""
    family = next(family for family in FAMILIES if family.module == kind)
    reference = Reference(family, folders[kind], torch.bfloat16)
    diffusion = build(family, folders[kind], **FLOW[0].ours).to(torch.bfloat16)
    assert np.array_equal(draw(diffusion, "guided", 2), reference.draw(FLOW[0], "guided", None, 2))


def test_the_size_is_the_pipelines_own_and_a_multiple_of_a_patch(folders):
    shapes = {"sd3": (16, 8, 8), "flux": (16, 128, 128), "flux2_klein": (128, 64, 64)}
    for name, shape in shapes.items():
        assert CLASSES[name](folders[name], 2).latent_shape == shape
        with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 72"):
            CLASSES[name](folders[name], 2, height=72, width=64)
    with pytest.raises(UserError, match="height and width must be at most 192 for this model, got 64 and 208"):
        StableDiffusion3(folders["sd3"], 2, height=64, width=208)


@pytest.mark.parametrize(
    ("kind", "configs", "message"),
    [
        (StableDiffusion3, {"transformer": {"in_channels": 33}}, "33 input channels and latents with 16"),
        (Flux, {"transformer": {"in_channels": 384}}, r"384 input channels: filling .* expected 64 \(text to image\)"),
        (Flux2Klein, {"vae": {"latent_channels": 16}}, "128 input channels; expected 64"),
        (Flux2Klein, {"text_encoder": {"num_hidden_layers": 24}}, "24 layers; expected at least 27"),
    ],
)
def test_other_models_in_the_same_format_are_refused(kind, configs, message):
    assert kind.misfit({}) == ""
    with pytest.raises(UserError, match=message):
        raise UserError(kind.misfit(configs))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (StableDiffusion3, {"max_sequence_length": 513}, r"must be an integer in 0 \.\. 512, got 513"),
        (Flux, {"max_sequence_length": 0}, r"must be an integer in 1 \.\. 512, got 0"),
        (Flux, {"true_cfg_scale": float("nan")}, "true_cfg_scale must be a finite number, got nan"),
        (Flux2Klein, {"max_sequence_length": 0}, "must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_loaded(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind("nowhere", **arguments)


def test_each_text_encoder_warns_of_what_it_cuts_off(folders):
    flux = Flux(folders["flux"], 2, height=64, width=64, max_sequence_length=90)
    klein = Flux2Klein(folders["flux2_klein"], 2, height=64, width=64, max_sequence_length=90)
    for diffusion, text, messages in [
        (flux, "a" * 75, []),
        (flux, "a" * 75 + "bcd", ["80 tokens and text_encoder reads 77; cut off: 'bcd'"]),
        (flux, "a" * 85 + "bcd", ["90 tokens and text_encoder reads 77", "cut off: 'aaaaaaaaaabcd'"]),
        (klein, "a" * 40, []),
        (klein, "a" * 65 + "bcd", ["68 tokens and the text encoder reads 65; cut off: 'bcd'"]),
    ]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            diffusion.encode([text], [None])
        assert bool(caught) == bool(messages)
        assert all(part in str(caught[0].message) for part in messages)


def test_a_text_encoder_reads_no_padding_for_prompt_features(folders):
    klein = Flux2Klein(folders["flux2_klein"], 2, height=64, width=64, max_sequence_length=80)
    longer = Flux2Klein(folders["flux2_klein"], 2, height=64, width=64, max_sequence_length=120)
    with torch.no_grad():
        found, expected = (each.prompt_features(each.encode(["panda"], [None])) for each in (klein, longer))
    assert found.shape == (1, klein.prompt_features_size)
    torch.testing.assert_close(found, expected)
