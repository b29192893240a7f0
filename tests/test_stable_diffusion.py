"""`StableDiffusion`: published layouts load, formulas hold, costs are counted, and errors name their cause."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from svdd import UserError
from svdd.__main__ import main
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.kernels.vp import BetaKernel
from svdd.diffusion.model_index import Source
from svdd.diffusion.pipelines import load_pipeline
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


@pytest.mark.parametrize("kind", ["LMSDiscreteScheduler", "DPMSolverSDEScheduler"])
@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}])
def test_a_saved_scheduler_needs_no_library_of_its_class(sd15, tmp_path, kind, settings):
    """Only its configuration is used, as of a class that needs none."""
    path, configs = copy(sd15, tmp_path), []
    saved = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, **settings}
    for name in (kind, "EulerDiscreteScheduler"):
        put("model_index.json", scheduler=["diffusers", name])(path)
        write("scheduler/scheduler_config.json", json.dumps({"_class_name": name, **saved}).encode())(path)
        loaded = load_pipeline(Source(str(path)), StableDiffusion.pipeline, StableDiffusion.misfit)
        configs.append(BetaKernel.settings(loaded.scheduler.config))
    x = torch.ones(1, 4, 8, 8)
    for scheduler in DIFFUSION_KERNELS:
        one, other = (DIFFUSION_KERNELS[scheduler](config, 5) for config in configs)
        assert torch.equal(one.timesteps, other.timesteps)
        assert [one.std(i) for i in range(5)] == [other.std(i) for i in range(5)]
        assert all(torch.equal(one.predict(x, x, i).mean, other.predict(x, x, i).mean) for i in range(5))


def test_weights_under_older_names_and_in_pickled_files_are_the_same(sd15, tmp_path, capfd):
    """As in the first repositories: attention of the VAE, the text encoder's prefix, and `.bin` files."""
    path, expected = copy(sd15, tmp_path), StableDiffusion(sd15, 1).state_dict()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def before(name: str) -> str:
        return next((name.replace(new, was) for new, was in old.items() if new in name), name)

    tensors(VAE, lambda state: {before(name): tensor for name, tensor in state.items()})(path)
    text = {f"text_model.{name}": tensor for name, tensor in load_file(path / TEXT).items()}
    torch.save(text | {"text_model.embeddings.position_ids": torch.arange(77)}, path / "text_encoder/pytorch_model.bin")
    torch.save(load_file(path / UNET), (path / UNET).with_suffix(".bin"))
    for file in (TEXT, UNET):
        (path / file).unlink()
    capfd.readouterr()
    found = StableDiffusion(str(path), 1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert capfd.readouterr() == ("", "")


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
    with pytest.raises(ValueError, match="states no image size; give height and width"):
        StableDiffusion(str(path.parent.parent), 2)
    assert StableDiffusion(str(path.parent.parent), 2, height=16, width=64).latent_shape == (4, 2, 8)


@pytest.mark.parametrize("scheduler", DIFFUSION_KERNELS)
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


def test_a_truncated_negative_prompt_is_reported_if_it_is_used_and_any_if_it_is_not(sd15):
    with pytest.warns(UserWarning, match="cut off: 'y'"):
        StableDiffusion(sd15, 2).encode(["a"], ["x" * 75 + "y"])
    unguided = StableDiffusion(sd15, 2, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="negative prompts have no effect: StableDiffusion computes no") as caught:
        unguided.encode(["a"], ["x" * 75 + "y"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unguided.encode(["a"], [None])


# ---- errors


def put(file: str, **settings) -> Callable[[Path], None]:
    """Returns what changes settings in a JSON file; None removes one."""

    def change(path: Path) -> None:
        found = {**json.loads((path / file).read_text()), **settings}
        (path / file).write_text(json.dumps({name: value for name, value in found.items() if value is not None}))

    return change


def write(file: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Returns what replaces a file, or, without a content, cuts its last 100 bytes."""
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:-100] if content is None else content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def tensors(file: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda path: save_file(change(load_file(path / file)), path / file, {"format": "pt"})


def without(word: str) -> Callable[[dict], dict]:
    return lambda state: {name: tensor for name, tensor in state.items() if word not in name}


def lose_a_shard(path: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(path / "unet")
    shutil.rmtree(path / "unet")
    network.save_pretrained(path / "unet", max_shard_size="20KB")
    next((path / "unet").glob("*-00002-*")).unlink()


INDEX, TOKENS, UNET = "model_index.json", "tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors"
TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
DAMAGE = {  # message: damage
    "is a FluxPipeline; this class takes a StableDiffusionPipeline, and AutoDiffusion any": put(
        INDEX, _class_name="FluxPipeline"
    ),
    r"names no class of pipelines in model_index\.json": put(INDEX, _class_name=None),
    r"cannot be loaded: .*model_index\.json is damaged \(Expecting": write(INDEX, b"{"),
    r"cannot be loaded: .*model_index\.json is damaged; expected a JSON object": write(INDEX, b"[]"),
    r"cannot be loaded: .*unet/config\.json is damaged": write("unet/config.json", b"\xff"),
    "takes its unet from my_unet.UNet, and code in a model is never run": put(INDEX, unet=["my_unet", "UNet"]),
    "names the class UNet9D, which this version of diffusers lacks": put(INDEX, unet=["diffusers", "UNet9D"]),
    "is incomplete: it has no folder unet": remove("unet"),
    "is incomplete: it has no folder tokenizer": remove("tokenizer"),
    r"its unet, cannot be loaded: .*unet/diffusion_pytorch_model\.safetensors is damaged \(.*not fully": write(UNET),
    r"text_encoder/model\.safetensors is damaged": write(TEXT),
    r"vae/.*safetensors is a pointer of Git LFS": write(VAE, b"version https://git-lfs.github.com/spec/v1\n"),
    r"its unet, cannot be loaded: .*-00002-of-.*which is required": lose_a_shard,
    "its unet, lacks 2 weights of UNet2DConditionModel, first conv_in.bias": tensors(UNET, without("conv_in")),
    "its vae, lacks 2 weights of AutoencoderKL": tensors(VAE, without("decoder.conv_in")),
    "its text_encoder, lacks 2 weights of CLIPTextModel": tensors(TEXT, without("layers.0.mlp.fc1")),
    "its unet, holds 1 weights that UNet2DC.* does not use, first odd": tensors(
        UNET, lambda s: s | {"odd": torch.ones(1)}
    ),
    "holds 1 weights of other shapes than its config.json states": tensors(
        TEXT, lambda s: {name: t[:, :3].contiguous() if "0.mlp.fc2.weight" in name else t for name, t in s.items()}
    ),
    r"its unet, cannot be loaded: .*conv_in.weight expected shape.*but got torch.Size\(\[3\]\)\.?$": tensors(
        UNET, lambda s: s | {"conv_in.weight": torch.ones(3)}
    ),
    "its tokenizer, is incomplete: .* lacks vocab.json, merges.txt": remove("tokenizer/tokenizer.json"),
    "states no model_max_length, and the text encoder reads 77": remove(TOKENS),
    "its tokenizer, states a model_max_length of 500": put(TOKENS, model_max_length=500),
    r"UNet with 9 input channels .*inpainting": put("unet/config.json", in_channels=9),
    "UNet with 8 output channels": put("unet/config.json", out_channels=8),
    "UNet with addition_embed_type='text_time'": put("unet/config.json", addition_embed_type="text_time"),
    "UNet with num_class_embeds=1000": put("unet/config.json", num_class_embeds=1000),
    "text states of width 32 and a text encoder of width 16": put("unet/config.json", cross_attention_dim=32),
    "autoencoder of class ConsistencyDecoderVAE": put("vae/config.json", _class_name="ConsistencyDecoderVAE"),
    "states no image size; give height and width": put("unet/config.json", sample_size=None),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(sd15, tmp_path, message):
    path = copy(sd15, tmp_path)
    DAMAGE[message](path)
    with pytest.raises(UserError, match=message) as caught:
        StableDiffusion(str(path), 2)
    assert "\n" not in str(caught.value)
    assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "y</w>"], "its tokenizer, knows no token of 'a photo"),
        (
            [f"{k}</w>" for k in range(300)] + ["a</w>"],
            "its tokenizer, has tokens up to number 302, but the model only 190",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(sd15, tmp_path, words, message):
    path = copy(sd15, tmp_path)
    vocabulary = {word: k for k, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(path / "tokenizer")
    with pytest.raises(UserError, match=message):
        StableDiffusion(str(path), 2)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "'nowhere' is not a folder; expected `emoji`, .*a folder .*or a hub name such as"),
        ("./no/where", "is not a folder"),
        ("/no/where", "is not a folder"),
        ("a/b/c", "is not a folder"),
        (
            "nobody/nothing",
            "'nobody/nothing' cannot be loaded: it is not, .* in the hub's cache, and downloads are off",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_expected(name, message):
    with pytest.raises(UserError, match=message):
        StableDiffusion(name, 2, local_files_only=True)


def test_what_is_no_folder_of_a_pipeline_is_refused_with_what_it_is(sd15, tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(
            UserError, match=message + r".*; expected `emoji`, .*a folder saved by StableDiffusionPipeline"
        ):
            StableDiffusion.examine({"pretrained": str(path)})

    refused(tmp_path, r"has no model_index\.json")
    refused(Path(sd15) / "unet", "is a UNet2DConditionModel alone and has no model_index")
    (tmp_path / "v1-5-pruned.safetensors").touch()
    refused(tmp_path, r"has no model_index\.json, but single files such as v1-5-pruned\.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 50}, "height must be a positive multiple of 8, got 50"),
        ({"width": 0}, "width must be a positive multiple of 8, got 0"),
        ({"width": -64}, "width must be a positive multiple of 8, got -64"),
        ({"height": 64.0}, "height must be a positive multiple of 8, got 64.0"),
        ({"eta": "1"}, r"eta must lie in 0 \.\. 1, got '1'"),
        ({"eta": 1.5}, r"eta must lie in 0 \.\. 1, got 1.5"),
        ({"eta": -0.1}, r"eta must lie in 0 \.\. 1, got -0.1"),
        ({"eta": float("nan")}, r"eta must lie in 0 \.\. 1, got nan"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
        (
            {"scheduler": "pndm"},
            "'pndm' has no Gaussian one-step kernel.*known: ddim, ddpm, euler, euler_ancestral, lcm",
        ),
        ({"scheduler": "DDIM"}, "did you mean 'ddim'"),
        ({"chunk_size": 0}, "chunk_size must be 'auto' or an integer >= 1, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": "3"}, r"guidance_scale must be a number, got '3' \(str\)"),
    ],
)
def test_arguments_out_of_range_are_refused(sd15, options, message):
    with pytest.raises(ValueError, match=message):
        StableDiffusion(sd15, **{"num_inference_steps": 2} | options)


@pytest.mark.parametrize("command", ["predict", "fit", "calibrate"])
def test_commands_refuse_another_class_before_anything_is_written(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / INDEX).write_text('{"_class_name": "FluxKontextPipeline"}')
    words = ["--model.reward", "Compressibility", "--data.prompts", "[a]", "--model.diffusion.pretrained", "./flux"]
    assert main([command, *words, "--output", "out", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]) == 2
    assert "pretrained='./flux' is a FluxKontextPipeline, which edits a picture; expected" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["flux"]
