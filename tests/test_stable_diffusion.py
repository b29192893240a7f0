"""`StableDiffusion`: published layouts load, formulas hold, costs are counted, and errors name their cause."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from svdd import UserError
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.state import State
from tests.analytic import run


@pytest.fixture(params=["sd15", "sd21"])
def folder(request) -> str:
    return request.getfixturevalue(request.param)


def copy(folder: str, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


# ---- loading


def test_a_published_layout_loads_frozen_in_evaluation_mode_and_float32(folder):
    diffusion = StableDiffusion(folder, 3)
    assert dict(diffusion.named_children()).keys() == {"unet", "vae", "text_encoder"}
    assert not any(module.training for child in diffusion.children() for module in child.modules())
    assert {parameter.dtype for parameter in diffusion.parameters()} == {torch.float32} == {diffusion.dtype}
    assert diffusion.latent_shape == (4, 8, 8)
    assert diffusion.device == torch.device("cpu")
    expected = "v_prediction" if "sd21" in folder else "epsilon"
    assert diffusion.kernel.config.prediction_type == expected


def test_the_safety_checker_is_not_read(sd15, tmp_path):
    path = copy(sd15, tmp_path)
    assert "safety_checker" in json.loads((path / "model_index.json").read_text())
    shutil.rmtree(path / "safety_checker")
    StableDiffusion(str(path), 2)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(sd15, capfd, shown):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    level = diffusers_logging.get_verbosity()
    try:
        for library in libraries:
            _show_bars(library, shown)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            StableDiffusion(sd15, 2)
        assert capfd.readouterr() == ("", "")
        assert diffusers_logging.get_verbosity() == level
        assert [library.is_progress_bar_enabled() for library in libraries] == [shown, shown]
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            _show_bars(library, enabled)


def _show_bars(library, shown):
    (library.enable_progress_bar if shown else library.disable_progress_bar)()


# ---- formulas


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_x0_and_the_mean_follow_the_papers(folder, guidance_scale):
    """Guidance, x0 from epsilon or v, and formula (12) of arXiv 2010.02502 agree with float64 computations."""
    diffusion = StableDiffusion(folder, 4, guidance_scale, eta=0.6)
    state = State.start(diffusion, ["a red apple", "blue car"], [0, 1])
    with torch.no_grad():
        for i in range(4):
            t = int(diffusion.kernel.timesteps[i])
            assert t == 250 * (3 - i) + 1  # leading spacing, offset 1
            positive, negative = state.context.conditioning
            output = diffusion.unet(state.x, t, positive["states"]).sample.double()
            if guidance_scale > 1:
                unconditional = diffusion.unet(state.x, t, negative["states"]).sample.double()
                output = (1 - guidance_scale) * unconditional + guidance_scale * output
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            levels = (1 - betas).cumprod(0)
            a, following = levels[t], levels[max(t - 250, 0)]
            x = state.x.double()
            if "sd21" in folder:
                x0, noise = a.sqrt() * x - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * x
            else:
                x0, noise = (x - (1 - a).sqrt() * output) / a.sqrt(), output
            std = 0.6 * ((1 - following) / (1 - a) * (1 - a / following)).sqrt()
            mean = following.sqrt() * x0 + (1 - following - std**2).sqrt() * noise
            assert state.std == pytest.approx(float(std), rel=1e-4)
            torch.testing.assert_close(state.x0.double(), x0, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(state.prediction.mean.double(), mean, rtol=1e-3, atol=1e-3)
            state = state.propose()
    assert state.done


def test_latents_are_decoded_to_pixels_between_0_and_1(sd15):
    diffusion = StableDiffusion(sd15, 2)
    x0 = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = diffusion.decode(x0)
        expected = (diffusion.vae.decode(x0 / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(images, expected)


# ---- cost and guidance


@pytest.mark.parametrize(("guidance_scale", "factor"), [(0.0, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_guidance_doubles_the_network_rows(sd15, guidance_scale, factor):
    diffusion = StableDiffusion(sd15, 2, guidance_scale)
    widths = []
    handle = diffusion.unet.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    with torch.no_grad():
        ledger = run(diffusion, Unguided(), None, 3).context.ledger
    handle.remove()
    assert widths == [3 * factor] * 2
    assert (ledger.denoiser_rows, ledger.network_rows) == (6, 6 * factor)


def test_without_guidance_a_negative_prompt_is_not_encoded(sd15):
    assert StableDiffusion(sd15, 2, guidance_scale=1.0).encode(["a"], ["b"])[1] is None
    positive, negative = StableDiffusion(sd15, 2, negative_prompt="blurry").encode(["blurry", "a"], [None, "a"])
    assert torch.equal(positive["states"], negative["states"])  # None means the model's; a given one overrides it


def test_images_need_not_be_square(sd15):
    diffusion = StableDiffusion(sd15, 2, height=48, width=80)
    assert diffusion.latent_shape == (4, 6, 10)
    with torch.no_grad():
        assert run(diffusion, Unguided(), None, 2).images.shape == (2, 3, 48, 80)
    assert StableDiffusion(sd15, 2, width=16).latent_shape == (4, 8, 2)


def test_an_image_has_the_size_that_the_pipeline_would_give_it(sd15, tmp_path):
    """The pipeline's constructor turns a size below 64 into 64 for networks saved by diffusers before 0.9."""
    path = copy(sd15, tmp_path) / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_diffusers_version": "0.6.0", "sample_size": 32}))
    assert StableDiffusion(str(path.parent.parent), 2).latent_shape == (4, 64, 64)
    path.write_text(json.dumps(config | {"sample_size": None}))
    with pytest.raises(ValueError, match="states no image size: set height and width"):
        StableDiffusion(str(path.parent.parent), 2)
    assert StableDiffusion(str(path.parent.parent), 2, height=16, width=64).latent_shape == (4, 2, 8)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler_ancestral"])
def test_every_scheduler_runs_one_step(folder, scheduler):
    diffusion = StableDiffusion(folder, 1, scheduler=scheduler)
    with torch.no_grad():
        final = run(diffusion, Unguided(), None, 1)
    assert final.images.isfinite().all()
    assert final.context.ledger.denoiser_rows == 1


# ---- long prompts


def test_a_truncated_prompt_is_reported_with_the_lost_words(sd15):
    diffusion = StableDiffusion(sd15, 2)
    prompt = "x" * 75 + " lost words"  # every letter is a token, plus start and end
    with pytest.warns(UserWarning, match=r"86 tokens and the text encoder reads 77; cut off: 'lost ?words'") as caught:
        cut, _ = diffusion.encode([prompt, prompt], [None, None])
    assert len(caught) == 1
    assert "(prompt: 'xxx" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = diffusion.encode(["x" * 75], [None])
    torch.testing.assert_close(cut["states"][0], whole["states"][0])


def test_a_truncated_negative_prompt_is_reported_if_it_is_used(sd15):
    with pytest.warns(UserWarning, match="cut off: 'y'"):
        StableDiffusion(sd15, 2).encode(["a"], ["x" * 75 + "y"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StableDiffusion(sd15, 2, guidance_scale=1.0).encode(["a"], ["x" * 75 + "y"])


# ---- errors


def another_pipeline(path: Path) -> None:
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))


def no_class_name(path: Path) -> None:
    (path / "model_index.json").write_text("{}")


def broken_json(path: Path) -> None:
    (path / "model_index.json").write_text("{")


def no_network(path: Path) -> None:
    shutil.rmtree(path / "unet")


def cut_network(path: Path) -> None:
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def cut_text_encoder(path: Path) -> None:
    weights = path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_tokenizer(path: Path) -> None:
    shutil.rmtree(path / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_pipeline, "is a StableDiffusionXLPipeline; this class takes a StableDiffusionPipeline"),
        (no_class_name, "cannot be loaded"),
        (broken_json, "cannot be loaded: .*not a valid JSON file"),
        (no_network, "cannot be loaded: .*no file named config.json"),
        (cut_network, "cannot be loaded: Unable to load weights"),
        (cut_text_encoder, "cannot be loaded"),
        (no_tokenizer, "has no usable tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(sd15, tmp_path, damage, message):
    path = copy(sd15, tmp_path)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        StableDiffusion(str(path), 2)
    assert "\n" not in str(caught.value)
    assert repr(str(path)) in str(caught.value)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "'nowhere' is not a folder; expected `emoji`, a folder .*or a hub name such as"),
        ("./no/where", "is not a folder"),
        ("/no/where", "is not a folder"),
        ("a/b/c", "is not a folder"),
        ("nobody/nothing", "'nobody/nothing' cannot be loaded"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_expected(name, message):
    with pytest.raises(UserError, match=message):
        StableDiffusion(name, 2, local_files_only=True)


def test_a_folder_or_file_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no model_index.json.*save_pretrained.*from_single_file"):
        StableDiffusion(str(tmp_path), 2)
    file = tmp_path / "v1-5-pruned.safetensors"
    file.touch()
    with pytest.raises(UserError, match="is not a folder"):
        StableDiffusion(str(file), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 50}, "height must be a positive multiple of 8, got 50"),
        ({"width": 0}, "width must be a positive multiple of 8, got 0"),
        ({"width": -64}, "width must be a positive multiple of 8, got -64"),
        ({"eta": 1.5}, r"eta must lie in 0 \.\. 1, got 1.5"),
        ({"eta": -0.1}, r"eta must lie in 0 \.\. 1, got -0.1"),
        ({"eta": float("nan")}, r"eta must lie in 0 \.\. 1, got nan"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
        ({"scheduler": "pndm"}, "'pndm' has no Gaussian one-step kernel.*known: ddim, ddpm, euler_ancestral"),
        ({"scheduler": "DDIM"}, "did you mean 'ddim'"),
        ({"chunk_size": 0}, "chunk_size must be 'auto' or an integer >= 1, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(sd15, options, message):
    with pytest.raises(ValueError, match=message):
        StableDiffusion(sd15, **{"num_inference_steps": 2} | options)
