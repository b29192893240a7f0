"""LoRA weights are fused into the model with the same result as in diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from svdd import UserError
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.state import Start
from svdd.values.posterior_mean import PosteriorMean

peft = pytest.importorskip("peft")
STEPS = 3


@pytest.fixture
def lora(sd15, tmp_path) -> str:
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return str(tmp_path)


def draw(**settings) -> np.ndarray:
    diffusion = StableDiffusion(num_inference_steps=STEPS, **settings)
    with torch.no_grad():
        images = Unguided()(Start(diffusion, ["apple"], [7]), PosteriorMean()).images
    return images.permute(0, 2, 3, 1).numpy()


def test_fused_weights_equal_the_pipeline(sd15, lora):
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(lora)
    generator = [torch.Generator().manual_seed(7)]
    settings = {"num_inference_steps": STEPS, "eta": 1.0, "output_type": "np", "generator": generator}
    expected = pipeline(["apple"], **settings).images
    ours = draw(pretrained=sd15, lora=lora)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - draw(pretrained=sd15)).max() > 1e-2


def test_a_missing_file_is_named(sd15, tmp_path):
    with pytest.raises(UserError, match=r"lora='.*nothing' cannot be loaded"):
        StableDiffusion(sd15, lora=str(tmp_path / "nothing"))


def test_an_adapter_is_part_of_a_values_identity(sd15, lora):
    (path,) = Path(lora).glob("*.safetensors")
    model = StableDiffusion(sd15, lora=lora)
    first, contents = model.identity, model.fingerprints()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    model = StableDiffusion(sd15, lora=lora)
    second, others = model.identity, model.fingerprints()
    assert {name for name in contents if contents[name] != others[name]} == {"unet"}
    assert {key for key in first if first[key] != second[key]} == {"weights"}
    again = StableDiffusion(sd15, lora=lora)
    assert (again.identity, again.fingerprints()) == (second, others)
