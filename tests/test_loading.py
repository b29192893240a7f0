"""Models from folders, single files and pipeline objects: the family, the precision, and where the parts live."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils.torch_utils import get_module_execution_device
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import svdd.diffusion
from benchmarks.memory import LivePeak
from svdd import GuidedDiffusion, UserError
from svdd.__main__ import main
from svdd.diffusion import AutoDiffusion, LatentDiffusion, from_pipeline
from svdd.diffusion.auto import families
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.dps import DPS
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided
from svdd.values.latent_conv import LatentConvValue
from tests.tiny_families.flux import save as save_flux
from tests.tiny_single_file import save_single_file

INDEX = "model_index.json"


@pytest.fixture(scope="module")
def single(sd15, tmp_path_factory) -> str:
    """The tiny Stable Diffusion in one file, under the names of the original code."""
    return save_single_file(sd15, tmp_path_factory.mktemp("single") / "one.safetensors")


def equal(one: LatentDiffusion, other: LatentDiffusion) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the family


def test_every_built_in_family_is_found_by_its_pipeline():
    classes = [getattr(svdd.diffusion, name) for name in svdd.diffusion.__all__]
    own = [c for c in classes if isinstance(c, type) and issubclass(c, LatentDiffusion) and hasattr(c, "pipeline")]
    known = families()
    assert {family.pipeline: family for family in own} == {name: known[name] for name in (c.pipeline for c in own)}
    assert len(own) == len({family.pipeline for family in own}) >= 10


def test_the_index_of_a_folder_chooses_the_family_and_its_arguments(sd15, tmp_path):
    assert type(AutoDiffusion(sd15, 2)) is StableDiffusion
    assert type(AutoDiffusion("emoji", num_inference_steps=2)) is StableDiffusion
    flux = AutoDiffusion(save_flux(tmp_path), 2, true_cfg_scale=3.0)
    assert type(flux) is svdd.diffusion.Flux
    assert (flux.true_cfg_scale, flux.max_sequence_length) == (3.0, 512)
    with pytest.raises(UserError, match="StableDiffusion has no argument 'true_cfg_scale'"):
        AutoDiffusion.examine({"pretrained": sd15, "true_cfg_scale": 3.0, "max_sequence_length": None})


def test_commands_take_the_arguments_of_a_family_without_its_name(sd15, tmp_path, capsys):
    words = ["predict", "--model.reward", "Compressibility", "--data.prompts", "[a]", "--output", str(tmp_path / "run")]
    words += ["--model.diffusion.pretrained", sd15, "--model.diffusion.true_cfg_scale"]
    assert main([*words, "high"]) == 2
    assert "model.diffusion: true_cfg_scale: expected float" in capsys.readouterr().err
    assert main([*words, "3"]) == 2
    assert "StableDiffusion has no argument 'true_cfg_scale'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        main(["predict", "--model.diffusion.help", "AutoDiffusion"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Flux: Weight of FLUX.1's classifier-free guidance with the negative prompts" in shown
    assert "T, the number of denoising steps" in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxKontextPipeline", "is a FluxKontextPipeline, which edits a picture; expected text to image: Stable.*did"),
        ("StableDiffusionInpaintPipeline", "which fills a part of a picture; .*did you mean 'StableDiffusionPipeline'"),
        ("StableDiffusionXLControlNetPipeline", "which is controlled by another picture"),
        ("WanPipeline", "which makes films"),
        ("AuraFlowPipeline", "which has no family here; expected text to image: StableDiffusionPipeline, .*, FluxPip"),
        (None, r"names no class of pipelines in model_index\.json; it has no family here"),
    ],
)
def test_a_pipeline_without_a_family_is_refused_with_what_it_is(tmp_path, name, message):
    (tmp_path / INDEX).write_text(json.dumps({"_class_name": name} if name else {}))
    with pytest.raises(UserError, match=message):
        AutoDiffusion.examine({"pretrained": str(tmp_path)})
    pipe = type(name or "Nothing", (), {})()
    with pytest.raises(UserError, match=message.partition(";")[0].partition("which ")[2] or "has no family"):
        from_pipeline(pipe)


def test_files_of_published_models_that_need_a_setting_or_have_no_kernel_are_named_before_they_load(sd15, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sd15, folder)
    (whole,) = (folder / "text_encoder").glob("*.safetensors")
    whole.rename(whole.with_name("model.bf16.safetensors"))  # as Sana's bfloat16 models
    with pytest.raises(UserError, match=r"its text_encoder, has weights of a variant alone; give variant: bf16$"):
        AutoDiffusion(str(folder))
    assert AutoDiffusion(str(folder), variant="bf16").weights == AutoDiffusion(sd15).weights
    index = json.loads((folder / INDEX).read_text())
    index["scheduler"] = ["diffusers", "EDMDPMSolverMultistepScheduler"]  # as Playground v2.5
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"noise levels of EDM \(EDMDPMSolver.*expected a scheduler with betas"):
        AutoDiffusion.examine({"pretrained": str(folder)})
    flow = FlowMatchEulerDiscreteScheduler()
    shutil.copytree(sd15, folder, dirs_exist_ok=True)
    flow.save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="the model's FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        AutoDiffusion.examine({"pretrained": str(folder)})
    with pytest.raises(UserError, match=r"pretrained='folder/' is not a folder; expected `emoji`"):
        AutoDiffusion.examine({"pretrained": "folder/"})


# ---- single files


def test_a_single_file_holds_the_same_model_as_its_folder(sd15, single):
    assert equal(AutoDiffusion(single, 2, config=sd15), StableDiffusion(sd15, 2))


def test_a_file_of_the_network_alone_takes_the_rest_from_its_configuration(sd15, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(sd15, other)
    weights = load_file(other / "unet/diffusion_pytorch_model.safetensors")
    file = tmp_path / "network.safetensors"
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    found, plain = AutoDiffusion(str(file), 2, config=sd15), AutoDiffusion(sd15, 2)
    assert all(torch.equal(tensor, weights[name] + 1) for name, tensor in found.unet.state_dict().items())
    assert all(torch.equal(tensor, plain.vae.state_dict()[name]) for name, tensor in found.vae.state_dict().items())


def test_single_files_that_cannot_be_used_are_refused_before_they_are_loaded(sd15, single, tmp_path):
    def refused(state: dict, message: str, config: str | None = sd15) -> None:
        file = tmp_path / "file.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in state.items()}, file)
        with pytest.raises(UserError, match=message) as caught:
            AutoDiffusion.examine({"pretrained": str(file), "config": config})
        assert "\n" not in str(caught.value)

    unet = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    refused({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "is a LoRA: give it as `lora`")
    refused({"transformer.blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "is a LoRA: give it as `lora`")
    refused(unet | {"scaled_fp8": (1,)}, "has quantised weights with scales")
    refused({"x": (1,)}, "of an unknown architecture, whose configuration is not known; give `config`", None)
    refused(
        {"controlnet_cond_embedding.conv_in.weight": (1,)}, "of the architecture controlnet; expected text to image"
    )
    refused(unet, "needs the configuration of its pipeline .*'stable-diffusion-v1-5/stable.* cannot be loaded", None)
    xl = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)}
    refused(xl, "of the architecture xl_base, but config=.* is that of a StableDiffusionPipeline")
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a file of another kind; expected a \.safetensors file"):
        AutoDiffusion.examine({"pretrained": str(tmp_path / "model.ckpt")})
    with pytest.raises(UserError, match=r"is damaged, or no \.safetensors file"):
        AutoDiffusion.examine({"pretrained": str(tmp_path / "model.safetensors")})
    with pytest.raises(UserError, match="is no single file, so it has its own configuration; leave out config"):
        AutoDiffusion.examine({"pretrained": sd15, "config": sd15})
    state = {name: tensor for name, tensor in load_file(single).items() if "time_embed.0" not in name}
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="lacks weights of UNet2DConditionModel; expected the file and the conf"):
        AutoDiffusion(str(tmp_path / "less.safetensors"), 2, config=sd15)
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lacks weights of SD3Transformer2DModel; expected the file and the conf"):
        AutoDiffusion(str(tmp_path / "other.safetensors"), 2, config="emoji-flow")


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_load_in_half_precision_without_a_copy_in_float32(single, sd15, tmp_path, dtype):
    StableDiffusionPipeline.from_pretrained(sd15, dtype=dtype).save_pretrained(tmp_path)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(single).items()}
    save_file(weights, tmp_path / "one.safetensors")
    name = str(dtype).removeprefix("torch.")
    for pretrained, config in ((str(tmp_path), None), (str(tmp_path / "one.safetensors"), sd15)):
        with LivePeak(torch.float32) as peak:
            diffusion = AutoDiffusion(pretrained, 2, config=config, dtype=name)
        assert {diffusion.dtype, *(tensor.dtype for tensor in diffusion.parameters())} == {dtype}
        sizes = [4 * tensor.numel() for tensor in diffusion.parameters()]
        assert peak.most <= max(sizes) + 0.05 * sum(sizes)  # one tensor at a time, and the scheduler's numbers


def test_a_value_learned_in_float32_is_valid_for_the_same_weights_in_half_precision(sd15):
    value, other = LatentConvValue(channels=4), None
    value.bind(Compressibility(), StableDiffusion(sd15, 2))
    for dtype in ("bfloat16", "float16"):
        other = LatentConvValue(channels=4)
        other.bind(Compressibility(), StableDiffusion(sd15, 2, dtype=dtype))
        other.load_checkpoint(value.checkpoint(), "the value")
    changed = StableDiffusion(sd15, 2)
    changed.weights = changed.weights_bfloat16 = "another model"
    other.bind(Compressibility(), changed)
    with pytest.raises(UserError, match="weights was"):
        other.load_checkpoint(value.checkpoint(), "the value")


@pytest.mark.parametrize(("precision", "expected"), [("bf16-true", "bfloat16"), ("bf16-mixed", "float32")])
def test_the_trainers_precision_is_that_of_the_weights(sd15, tmp_path, monkeypatch, precision, expected):
    read = []
    own = StableDiffusion.take_parts

    def watch(self, *args):
        own(self, *args)
        read.append({str(tensor.dtype) for tensor in self.parameters()})

    monkeypatch.setattr(StableDiffusion, "take_parts", watch)
    words = ["predict", "--model.reward", "Compressibility", "--model.sampler", "Unguided", "--data.prompts", "[a]"]
    words += ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "2"]
    words += ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu", "--trainer.precision", precision]
    assert main(words) == 0
    assert read == [{f"torch.{expected}"}]
    assert main(words) == 0  # the same configuration, so it continues


# ---- pipeline objects


@pytest.fixture
def pipe(sd15) -> StableDiffusionPipeline:
    """A pipeline with another scheduler, a token of textual inversion and a LoRA that is not fused."""
    found = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config, timestep_spacing="trailing")
    found.load_textual_inversion({"<toy>": torch.ones(2, 16)}, token="<toy>")
    found.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"), "style")
    for name, parameter in found.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    found.set_adapters(["style"], [0.5])
    found.unet.train()
    return found


def drawn(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """Returns two pictures of the pipeline's own `__call__`, [n, 3, h, w]."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    texts = ["a <toy>", "x"]
    images = pipe(texts, num_inference_steps=3, generator=generators, eta=1.0, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_a_pipeline_object_draws_the_same_pictures_and_stays_as_it_is(pipe):
    def facts() -> list:
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
        about = [(part.device, part.dtype, part.training, part.forward.__qualname__) for part in parts]
        return [about, pipe.get_active_adapters(), type(pipe.scheduler), dict(pipe.scheduler.config)]

    before, own = facts(), drawn(pipe)
    chain = from_pipeline(pipe, num_inference_steps=3)
    model = GuidedDiffusion(Compressibility(), chain, Unguided())
    assert torch.equal(model.sample(["a <toy>", "x"], seed=5)[0], own)
    other = GuidedDiffusion(Compressibility(), pipe, SVDD(2))  # of the same pipeline
    assert other.diffusion.num_inference_steps == 50
    assert model.diffusion.identity["lora"] == {"style": [2.0]}  # lora_alpha / r * 0.5
    assert {f"diffusion.{name}" for name in ("unet", "vae", "text_encoder", "adapters")} <= model.fingerprints().keys()
    model.to(torch.float64).train()
    assert facts() == before
    assert torch.equal(drawn(pipe), own)
    assert torch.equal(GuidedDiffusion(Compressibility(), chain, Unguided()).sample(["a <toy>", "x"], seed=5)[0], own)


def test_what_changes_the_pictures_of_a_pipeline_object_changes_its_identity(pipe):
    chain = from_pipeline(pipe, num_inference_steps=3)
    identity, prints = chain.identity, chain.fingerprints()
    assert identity["weights"] == from_pipeline(pipe, num_inference_steps=3).identity["weights"]
    pipe.set_adapters(["style"], [1.0])
    assert chain.identity["lora"] == {"style": [4.0]}
    assert {name for name, found in chain.fingerprints().items() if prints[name] != found} == {"adapters"}
    pipe.disable_lora()
    assert chain.identity["lora"] is None
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1
    assert chain.fingerprints()["vae"] != prints["vae"]
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert from_pipeline(pipe, num_inference_steps=3).fingerprints()["configuration"] != prints["configuration"]


def test_a_pipeline_object_goes_to_its_family(pipe):
    assert isinstance(AutoDiffusion(pipe, num_inference_steps=3), StableDiffusion)
    with pytest.raises(
        UserError, match="StableDiffusionXL takes a StableDiffusionXLPipeline, got a StableDiffusionPip"
    ):
        svdd.diffusion.StableDiffusionXL(pipe)


def test_arguments_about_loading_are_refused_for_a_pipeline_object(pipe):
    with pytest.raises(UserError, match="dtype, offload: a pipeline object has been loaded already; set this on the"):
        from_pipeline(pipe, offload="model", dtype="bfloat16")
    with pytest.raises(UserError, match="StableDiffusion has no argument 'guidance'; did you mean 'guidance_scale'"):
        from_pipeline(pipe, guidance=3.0)
    pipe.unet.config["in_channels"] = 9
    with pytest.raises(UserError, match="a StableDiffusionPipeline has a UNet with 9 input channels"):
        from_pipeline(pipe)


# ---- memory


@pytest.mark.parametrize("offload", ["none", "text_encoders", "model"])
def test_offloaded_parts_are_on_the_device_only_while_they_compute(sd15, offload):
    """On the meta device, which takes no part in computations with another one."""
    diffusion = StableDiffusion(sd15, 2, offload=offload)
    kept = {name: tensor.clone() for name, tensor in diffusion.state_dict().items()}

    def there() -> list[str]:
        return [name for name, part in diffusion.parts.items() if next(part.parameters()).device.type == "meta"]

    always = {"none": ["unet", "vae", "text_encoder"], "text_encoders": ["unet", "vae"], "model": []}[offload]
    with torch.inference_mode():
        diffusion.to("meta")
        assert (there(), diffusion.device.type) == (always, "meta")
        # where pipelines put the inputs of a part
        assert {get_module_execution_device(part).type for part in diffusion.parts.values()} == {"meta"}
        conditioning, row = diffusion.encode(["a", "b"], [None, None]), torch.zeros(3, dtype=torch.int64, device="meta")
        assert there() == always
        x = torch.empty(3, *diffusion.latent_shape, device="meta")
        for i in range(2):
            x = diffusion.denoise(x, i, conditioning, row).mean
            assert there() == (["unet"] if offload == "model" else always)
            assert diffusion.decode(x).device.type == "meta"
            assert there() == (["vae"] if offload == "model" else always)
    if offload != "none":
        diffusion.to(torch.bfloat16)
        assert (there(), diffusion.text_encoder.dtype) == (always, torch.bfloat16)
        assert all(torch.equal(v, kept[k].bfloat16()) for k, v in diffusion.state_dict().items() if "text_enc" in k)


@pytest.mark.parametrize("sampler", [Unguided(), DPS(10.0)])
def test_offload_changes_no_picture(sd15, tiny_clip, sampler):
    from svdd.rewards.clip import CLIPScore

    def sample(**options) -> torch.Tensor:
        return GuidedDiffusion(CLIPScore(tiny_clip), StableDiffusion(sd15, 2, **options), sampler).sample(["a"])[0]

    assert torch.equal(sample(), sample(offload="model"))
    assert torch.equal(sample(), sample(vae_slicing=True))


def test_settings_that_a_model_cannot_have_are_refused(sd15, monkeypatch):
    assert StableDiffusion(sd15, 2, vae_tiling=True).vae.use_tiling
    with pytest.raises(ValueError, match="offload='model' cannot be combined with compile"):
        StableDiffusion(sd15, 2, offload="model", compile=True)
    monkeypatch.delattr("diffusers.models.autoencoders.vae.AutoencoderMixin.enable_tiling", raising=False)
    with pytest.raises(UserError, match="vae_tiling: a AutoencoderKL has no tiling; leave it out"):
        StableDiffusion(sd15, 2, vae_tiling=True)


@pytest.mark.parametrize(
    ("part", "lacking"),
    [("vae", "vae"), ("unet", "unet or transformer"), ("scheduler", "scheduler"), ("tokenizer", "tokenizer")],
)
def test_a_model_without_a_part_is_refused_by_its_index(part, lacking, sd15, tmp_path):
    index = json.loads((Path(sd15) / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {part: [None, None]}))
    with pytest.raises(UserError, match=f"is incomplete: {INDEX} names no {lacking}; expected the whole model"):
        AutoDiffusion.examine({"pretrained": str(tmp_path)})


def test_a_family_may_be_named_before_or_after_its_arguments(sd15, tmp_path):
    given = ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "2"]
    words = ["--model.reward", "Compressibility", "--model.sampler", "Unguided", "--data.prompts", '["a"]']
    words += ["--trainer.accelerator", "cpu", "--output"]
    found = []
    for k, order in enumerate(
        ([*given, "--model.diffusion", "StableDiffusion"], ["--model.diffusion", "StableDiffusion", *given])
    ):
        assert main(["predict", *order, *words, str(tmp_path / str(k))]) == 0
        found.append(yaml.safe_load((tmp_path / str(k) / "config.yaml").read_text())["model"]["diffusion"])
    assert found[0] == found[1]
    assert found[0]["init_args"]["pretrained"] == sd15
