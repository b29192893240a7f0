"""LoRA weights in every usual format are fused into the model with the same result as in diffusers or PEFT."""

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdd import UserError
from svdd.diffusion.lora import fuse_lora, load_lora
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean

peft = pytest.importorskip("peft")
STEPS, RANK, ALPHA = 3, 2, 3.0
TARGETS = re.compile(r".*(to_q|to_out\.0|conv1|ff\.net\.2)$|.*(q_proj|out_proj|fc1)$")
Pairs = dict[str, dict[str, tuple[Tensor, Tensor]]]  # down and up, by part and layer


@pytest.fixture(scope="module")
def pipeline(sd15) -> Callable[[], StableDiffusionPipeline]:
    return lambda: StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)


@pytest.fixture(scope="module")
def pairs(pipeline) -> Pairs:
    """Random updates of linear and convolutional layers of the UNet and of the text encoder."""
    generator, found, model = torch.Generator().manual_seed(0), {}, pipeline()
    for part in ("unet", "text_encoder"):
        layers = [(name, layer.weight) for name, layer in getattr(model, part).named_modules() if TARGETS.match(name)]
        found[part] = {}
        for name, weight in layers:
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.2
            up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator) * 0.2
            found[part][name] = (down, up)
    return found


def diffusers_folder(pairs: Pairs, folder: Path, start: str = "{part}.") -> None:
    state = {
        f"{start.format(part=part)}{name}.lora_{letter}.weight": tensor
        for part, layers in pairs.items()
        for name, pair in layers.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(state, folder / "pytorch_lora_weights.safetensors")


def attention_processors(pairs: Pairs, folder: Path) -> None:
    """The names of diffusers before PEFT: of the UNet's attention, without `unet.`."""
    state = {}
    for name, pair in pairs["unet"].items():
        if "attn" in name:
            start = name.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.").removesuffix(".0")
            state |= {f"{start}_lora.{way}.weight": part for way, part in zip(("down", "up"), pair, strict=True)}
    save_file(state, folder / "old.safetensors")


def kohya_file(pairs: Pairs, folder: Path) -> None:
    state = {}
    for part, start in {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}.items():
        for name, (down, up) in pairs[part].items():
            stem = start + name.replace(".", "_")
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            state[f"{stem}.alpha"] = torch.tensor(ALPHA + name.count("attn"))
    save_file(state, folder / "kohya.safetensors")


def peft_adapters(pairs: Pairs, folder: Path, **settings) -> None:
    """One adapter in the folder itself for one part, or one in a subfolder for each of several."""
    for part, layers in pairs.items():
        inner = folder / part if len(pairs) > 1 else folder
        inner.mkdir(exist_ok=True)
        state = {
            f"base_model.model.{name}.lora_{letter}.weight": tensor
            for name, pair in layers.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }
        save_file(state, inner / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(layers), **settings}
        (inner / "adapter_config.json").write_text(json.dumps(config))


def draw(**settings) -> np.ndarray:
    diffusion = StableDiffusion(num_inference_steps=STEPS, **settings)
    with torch.no_grad():
        images = Unguided()(Start(diffusion, ["apple"], [7]), PosteriorMean()).images
    return images.permute(0, 2, 3, 1).numpy()


def assert_equal_weights(ours: StableDiffusion, theirs: StableDiffusionPipeline, base: StableDiffusionPipeline) -> None:
    for part in ("unet", "text_encoder"):
        found, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(part, ours.unet.state_dict()[name]) for name, part in base.unet.state_dict().items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("parts", [["text_encoder"], ["unet", "text_encoder"]])
def test_each_layer_of_a_kohya_file_has_the_strength_that_its_alpha_states(sd15, pairs, tmp_path, parts, half):
    """Ranks and alphas differ, some layers have no alpha; some are of attention, whose names are unlike the others."""
    state, expected, base = {}, {}, StableDiffusion(sd15, STEPS)
    for part in parts:
        start = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
        for i, (name, pair) in enumerate(pairs[part].items()):
            if len(parts) == 1 and "q_proj" not in name:
                continue  # the query's projections alone
            stem, rank = start + name.replace(".", "_"), 1 + i % RANK
            down, up = (
                tensor.half() if half else tensor for tensor in (pair[0][:rank], pair[1][:, :rank].contiguous())
            )
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            alpha = (rank, 0, 3, 0.5, 1)[i % 5]
            if i % 5 > 0:
                state[f"{stem}.alpha"] = torch.tensor(float(alpha))
            weight = getattr(base, part).get_submodule(name).weight.detach()
            update = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
            expected[f"{part}.{name}.weight"] = weight + 0.4 * alpha / rank * update
    save_file(state, tmp_path / "kohya.safetensors")
    found, before = StableDiffusion(sd15, STEPS, lora=str(tmp_path), lora_scale=0.4).state_dict(), base.state_dict()
    assert len(expected) > 1
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected.get(name, before[name]), rtol=0, atol=1e-3 if half else 1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_fused_weights_equal_those_of_diffusers(sd15, pipeline, pairs, tmp_path, scale):
    diffusers_folder(pairs, tmp_path)
    theirs = pipeline()
    theirs.load_lora_weights(str(tmp_path))
    theirs.fuse_lora(lora_scale=scale)
    theirs.unload_lora_weights()
    ours = StableDiffusion(sd15, STEPS, lora=str(tmp_path), lora_scale=scale)
    assert_equal_weights(ours, theirs, pipeline())


@pytest.mark.parametrize("parts", [["unet"], ["text_encoder"], ["unet", "text_encoder"]])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "alpha_pattern": {"conv1": 7}}])
def test_fused_peft_adapters_equal_those_of_peft(sd15, pipeline, pairs, tmp_path, parts, settings):
    peft_adapters({part: pairs[part] for part in parts}, tmp_path, **settings)
    theirs, base, ours = pipeline(), pipeline(), StableDiffusion(sd15, STEPS, lora=str(tmp_path))
    for part in parts:
        inner = tmp_path / part if len(parts) > 1 else tmp_path
        setattr(theirs, part, peft.PeftModel.from_pretrained(getattr(theirs, part), inner).merge_and_unload())
    for part in ("unet", "text_encoder"):
        before, expected, found = (getattr(model, part).state_dict() for model in (base, theirs, ours))
        changed = {f"{layer}.weight" for layer in (pairs[part] if part in parts else [])}
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
            assert torch.equal(weight, before[name]) == (name not in changed)


def test_other_containers_of_the_same_weights_are_read_alike(sd15, pairs, tmp_path):
    """Names with PEFT's adapter name, and a checkpoint that holds its weights under `state_dict`."""
    diffusers_folder(pairs, tmp_path)
    (file,) = tmp_path.iterdir()
    expected, state = StableDiffusion(sd15, STEPS, lora=str(file)).unet.state_dict(), load_file(file)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    save_file({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, tmp_path / "x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        found = StableDiffusion(sd15, STEPS, lora=str(tmp_path / name)).unet.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_names_without_their_part_are_found_in_the_model(sd15, pipeline, pairs, tmp_path):
    """`attention_processors` is read as the same updates with their part."""
    attention_processors(pairs, tmp_path)
    theirs = pipeline()
    state = {f"unet.{name}": tensor for name, tensor in load_file(tmp_path / "old.safetensors").items()}
    theirs.load_lora_weights(state)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    assert_equal_weights(StableDiffusion(sd15, STEPS, lora=str(tmp_path)), theirs, pipeline())


def test_pictures_equal_the_pipelines(sd15, pipeline, pairs, tmp_path):
    diffusers_folder(pairs, tmp_path)
    theirs = pipeline()
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(str(tmp_path))
    settings = {"num_inference_steps": STEPS, "eta": 1.0, "output_type": "np"}
    expected = theirs(["apple"], generator=[torch.Generator().manual_seed(7)], **settings).images
    ours, base = draw(pretrained=sd15, lora=str(tmp_path)), draw(pretrained=sd15)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - base).max() > 1e-2
    assert np.array_equal(draw(pretrained=sd15, lora=str(tmp_path), lora_scale=0.0), base)


LINEAR = re.compile(r".*(to_q|to_out\.0|conv1|q_proj|fc1|attention\.to_k|qkv_mlp_proj)$")
SGM = {"down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.attentions.0": "middle_block.1"}  # SDXL's own names
SGM |= {f"up_blocks.0.attentions.{k}": f"output_blocks.{k}.1" for k in range(2)}


def family_pairs(model) -> Pairs:
    """Random updates of some layers of every part of a pipeline that takes a LoRA."""
    generator, found = torch.Generator().manual_seed(0), {}
    for part in model._lora_loadable_modules:
        layers = [(name, layer.weight) for name, layer in getattr(model, part).named_modules() if LINEAR.match(name)]
        found[part] = {
            name: tuple(
                torch.randn(size, generator=generator) * 0.2 for size in ((2, weight.shape[1]), (len(weight), 2))
            )
            for name, weight in layers
            if weight.ndim == 2
        }
    return found


def kohya_xl(pairs: Pairs, folder: Path, blocks: dict[str, str]) -> None:
    state, starts = {}, {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}
    for part, layers in pairs.items():
        for name, (down, up) in layers.items():
            for theirs, own in blocks.items():
                name = name.replace(theirs, own)
            stem = starts[part] + name.replace(".", "_")
            state |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(3.0),
            }
    save_file(state, folder / "kohya.safetensors")


def kohya_flux(pairs: Pairs, folder: Path) -> None:
    """Keeps the layers of the double blocks that kohya's scripts do not join with others."""
    for name in [name for name in pairs["transformer"] if not re.match(r"transformer_blocks\..*to_out", name)]:
        del pairs["transformer"][name]
    state = {}
    for part, layers in pairs.items():
        for name, (down, up) in layers.items():
            stem = f"lora_te1_text_model_{name.replace('.', '_')}"
            if part == "transformer":
                stem = f"lora_unet_double_blocks_{name.split('.')[1]}_img_attn_proj"
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            state[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(state, folder / "kohya.safetensors")


FORMATS = {
    "diffusers": diffusers_folder,
    "kohya": lambda pairs, folder: kohya_xl(pairs, folder, {}),
    "sgm": lambda pairs, folder: kohya_xl(pairs, folder, SGM),
    "peft": peft_adapters,
    "kohya flux": kohya_flux,
}


@pytest.mark.parametrize(
    ("family", "form"),
    [("sdxl", form) for form in ("diffusers", "kohya", "sgm", "peft")]
    + [(name, "diffusers") for name in ("sd3", "flux", "flux2_klein")]
    + [("flux", "kohya flux")],
)
def test_a_lora_of_each_family_changes_the_weights_as_it_does_in_diffusers(family, form, tmp_path):
    folder = import_module(f"tests.tiny_families.{family}").save(tmp_path / "model")
    ours, theirs, base = (DiffusionPipeline.from_pretrained(folder) for _ in range(3))
    pairs = family_pairs(base)
    FORMATS[form](pairs, tmp_path)
    load_lora(ours, str(tmp_path))
    fuse_lora(ours, str(tmp_path), 0.4)
    assert all(pairs.values())
    for part, layers in pairs.items():
        before, found = getattr(base, part).state_dict(), getattr(ours, part).state_dict()
        factor = 0.4 * {"diffusers": 1.0}.get(form, ALPHA / RANK)
        for name, weight in before.items():
            down_up = layers.get(name.removesuffix(".weight"))
            expected = weight if down_up is None else weight + factor * down_up[1] @ down_up[0]
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    if form == "diffusers":
        theirs.load_lora_weights(str(tmp_path))
        theirs.fuse_lora(list(pairs), lora_scale=0.4)
        theirs.unload_lora_weights()
        for part in pairs:
            found, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def edit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        save_file(change(load_file(file)), file)

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    return edit(lambda state: {name.replace(old, new): tensor for name, tensor in state.items()})


ZERO = "changes no weight: all its updates are zero"


def with_metadata(text: str) -> Callable[[Path], None]:
    return lambda folder: [
        save_file(load_file(file), file, {"lora_adapter_metadata": text}) for file in folder.glob("*.safetensors")
    ]


def with_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


REFUSED = {  # message: format, damage
    f"{ZERO};": (kohya_file, edit(lambda s: {k: 0 * v if k.endswith(".alpha") else v for k, v in s.items()})),
    f"{ZERO}; expected": (peft_adapters, with_config('{"r": 2, "lora_alpha": 0}')),
    "lora_adapter_metadata in its header is damaged .*; expected JSON": (diffusers_folder, with_metadata("{bad")),
    "has rank .2., but its settings state r=8": (diffusers_folder, with_metadata('{"unet.r": 8}')),
    "states r='2' in its settings; expected a number": (peft_adapters, with_config('{"r": "2"}')),
    "changes no weight: all its updates are zero": (diffusers_folder, edit(lambda s: {k: 0 * v for k, v in s.items()})),
    r"unet\.down_blocks\S* has shape \[\d+, 16, 3, 3\], its update \[\d+, 99, 3, 3\]; expected a LoRA for this base": (
        diffusers_folder,
        edit(lambda s: {k: v.new_ones(2, 99, 3, 3) if "conv1.lora_A" in k else v for k, v in s.items()}),
    ),
    r"(\d+) of its \1 weights belong to no layer of the model, first transformer\.": (
        diffusers_folder,
        edit(lambda s: {f"transformer.x.{k}": v for k, v in s.items()}),
    ),
    r"2 of its \d+ weights belong to no layer of the model, first unet\.down_blocks\.9": (
        diffusers_folder,
        edit(lambda s: s | {f"unet.down_blocks.9.to_q.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}),
    ),
    "has only one of its two matrices": (
        diffusers_folder,
        edit(lambda s: {k: v for k, v in s.items() if "conv1.lora_B" not in k}),
    ),
    "adapter of another kind": (kohya_file, rename("lora_down.weight", "hada_w1_a")),
    "cannot be loaded: .*NaN": (
        diffusers_folder,
        edit(lambda s: {k: v * torch.nan for k, v in s.items()}),
    ),
    "holds no LoRA weights, first 'x'": (diffusers_folder, edit(lambda s: {"x": torch.ones(1)})),
    "diffusers cannot read, such as": (kohya_file, rename("lora_up", "lora_over")),
    "belong to no layer of the model, first unet.down_blocks.0.attentions.0.transformer_blocks.5": (
        kohya_file,
        rename("transformer_blocks_0", "transformer_blocks_5"),
    ),
    "cannot be read as weights: ": (diffusers_folder, lambda folder: next(folder.iterdir()).write_bytes(b"x" * 100)),
    "needs a readable adapter_config.json": (peft_adapters, lambda folder: (folder / "adapter_config.json").unlink()),
    "is a LOHA adapter": (
        peft_adapters,
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}'),
    ),
    r"has rank \[2\], but its settings state r=5": (
        peft_adapters,
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 5}'),
    ),
    "give weight_name, the one to load; its weights files: a.safetensors, b.safetensors": (
        kohya_file,
        lambda folder: (
            [save_file({"x": torch.ones(1)}, folder / f"{n}.safetensors") for n in "ab"]
            and (folder / "kohya.safetensors").unlink()
        ),
    ),
    "its weights files: none": (diffusers_folder, lambda folder: next(folder.iterdir()).unlink()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_lora_that_does_not_fit_is_refused_in_one_line(sd15, pairs, tmp_path, message):
    write, damage = REFUSED[message]
    write({"unet": pairs["unet"]} if write is peft_adapters else pairs, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        StableDiffusion(sd15, STEPS, lora=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"lora={str(tmp_path)!r}")
    assert len(str(caught.value)) < 500


def test_a_file_is_named_in_a_folder_or_on_the_hub(sd15, pairs, tmp_path):
    kohya_file(pairs, tmp_path)
    diffusers_folder(pairs, tmp_path)
    file = tmp_path / "kohya.safetensors"
    named = StableDiffusion(sd15, STEPS, lora=str(tmp_path), weight_name="kohya.safetensors").unet.state_dict()
    given = StableDiffusion(sd15, STEPS, lora=str(file)).unet.state_dict()
    assert all(torch.equal(named[name], given[name]) for name in given)
    for lora, options, message in (
        (str(tmp_path), {"weight_name": "c.bin"}, "weight_name='c.bin' is not among them; its weights files: kohya"),
        (str(tmp_path / "nothing"), {}, "does not exist; expected a file, a folder, or a hub name"),
    ):
        with pytest.raises(UserError, match=re.escape(f"lora={lora!r}") + ".*" + message):
            StableDiffusion.examine({"pretrained": sd15, "lora": lora, **options})
    for lora, options in (("owner/name", {"weight_name": "x.safetensors"}), ("owner/name/x.safetensors", {})):
        with pytest.raises(UserError, match=f"lora='{lora}' cannot be loaded: .*downloads are off"):
            StableDiffusion(sd15, STEPS, lora=lora, local_files_only=True, **options)


def test_an_adapter_is_part_of_a_values_identity(sd15, pairs, tmp_path):
    diffusers_folder(pairs, tmp_path)
    (path,), lora = tmp_path.glob("*.safetensors"), str(tmp_path)
    model = StableDiffusion(sd15, lora=lora)
    first, contents = model.identity, model.fingerprints()
    save_file({name: 2 * tensor if "unet" in name else tensor for name, tensor in load_file(path).items()}, path)
    model = StableDiffusion(sd15, lora=lora)
    second, others = model.identity, model.fingerprints()
    assert {name for name in contents if contents[name] != others[name]} == {"unet"}
    assert {key for key in first if first[key] != second[key]} == {"weights"}
    again, scaled = StableDiffusion(sd15, lora=lora), StableDiffusion(sd15, lora=lora, lora_scale=0.5).identity
    assert (again.identity, again.fingerprints()) == (second, others)
    assert {key for key in first if second[key] != scaled[key]} == {"lora"}
