"""What Qwen-Image, Z-Image and Sana, whose text encoders are language models, do beyond the tests of all families."""

import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import svdd.diffusion
from svdd import UserError
from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.preview import Preview
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import qwen_image, sana, z_image

PROMPTS, NEGATIVES = ["a red apple on a wooden table", "panda"], ["dark and far away", ""]
KINDS = {"QwenImage": qwen_image, "ZImage": z_image, "Sana": sana}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: module.save(tmp_path_factory.mktemp(kind)) for kind, module in KINDS.items()}


def ours(kind, folder, steps, size, **options):
    return getattr(svdd.diffusion, kind)(
        folder, steps, 4.0, eta=0.0, height=size[0], width=size[1], parity=True, **options
    )


@torch.no_grad()
def draw(diffusion):
    final = Unguided()(Start(diffusion, PROMPTS, [0, 1], NEGATIVES), PosteriorMean())
    return final.images.permute(0, 2, 3, 1).numpy(), final.context.ledger


def reference(kind, folder, steps, size, dtype=torch.float32, scheduler=None, lora=None, **options):
    pipe = getattr(diffusers, getattr(svdd.diffusion, kind).pipeline).from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if kind == "Sana":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scheduler)
    scale = "true_cfg_scale" if kind == "QwenImage" else "guidance_scale"
    return pipe(
        list(PROMPTS),
        negative_prompt=list(NEGATIVES),
        num_inference_steps=steps,
        height=size[0],
        width=size[1],
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="np",
        **{scale: 4.0, **options},
    ).images


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_in_half_precision_equal_the_pipelines(kind, folders):
    options = {"use_resolution_binning": False} if kind == "Sana" else {}
    expected = reference(kind, folders[kind], 3, (64, 96), torch.bfloat16, **options)
    diffusion = ours(kind, folders[kind], 3, (64, 96), dtype="bfloat16").to(torch.bfloat16)
    assert diffusion.dtype == (torch.bfloat16 if kind == "QwenImage" else torch.float32)
    assert np.array_equal(draw(diffusion)[0], expected)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cfg_truncation": 0.5}, 4 * 2 + 1),  # of the progress 0, 1/13, 2/11, 1/3 and 4/7 at shift 3
        ({"cfg_normalization": 0.5}, 5 * 2),
        ({"cfg_normalization": 1.0, "cfg_truncation": 0.1}, 2 * 2 + 3),
    ],
)
def test_z_image_truncates_and_normalises_guidance_as_its_pipeline(options, rows, folders):
    expected = reference("ZImage", folders["ZImage"], 5, (64, 96), **options)
    diffusion = ours("ZImage", folders["ZImage"], 5, (64, 96), **options)
    found, ledger = draw(diffusion)
    assert np.array_equal(found, expected)
    previews = [[diffusion.has_preview(each, i) for i in range(5)] for each in (Preview(0.0), Preview(None, True))]
    assert [5 + sum(each) for each in previews] == [rows] * 2  # one where there is guidance
    assert ledger.network_rows == 2 * rows
    assert not np.array_equal(found, draw(ours("ZImage", folders["ZImage"], 5, (64, 96)))[0])


def test_the_settings_of_qwen_image_lightning(folders):
    options = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    expected = reference("QwenImage", folders["QwenImage"], 4, (64, 96), scheduler=options)
    assert np.array_equal(
        draw(ours("QwenImage", folders["QwenImage"], 4, (64, 96), scheduler_options=options))[0], expected
    )


def test_settings_without_effect_are_refused(folders):
    size = {"height": 64, "width": 64}
    for kind, arguments, message in (
        ("QwenImage", {"scheduler_options": {"shift": 3.0}}, "no effect of shift while use_dynamic_shifting is true"),
        ("Sana", {"scheduler_options": {"max_shift": 1.0}}, "no effect of max_shift while use_dynamic_shifting is"),
        ("ZImage", {"cfg_truncation": 0.5, "inner_steps": 2}, "cfg_truncation cannot be combined with inner_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(svdd.diffusion, kind)(folders[kind], 4, **size, **arguments)
    options = {"use_dynamic_shifting": False, "shift": 3.0}
    levels = svdd.diffusion.QwenImage(folders["QwenImage"], 4, scheduler_options=options, **size).kernel.levels
    s = torch.linspace(1, 0.25, 4)
    ends = 0.02  # shift_terminal, to which the levels are stretched
    shifted = 1 - (1 - 3 * s / (1 + 2 * s)) * (1 - ends) / 0.5
    assert [sigma for _, sigma in levels[:-1]] == pytest.approx(shifted.tolist())


def small_lora(kind, folder, file):
    """Writes a LoRA of the attention layers, with alphas and their older names as Qwen-Image-Lightning, or without."""
    network = getattr(diffusers, getattr(svdd.diffusion, kind).pipeline).from_pretrained(folder).transformer
    generator, state = torch.Generator().manual_seed(3), {}
    for name, layer in network.named_modules():
        if name.endswith(("to_q", "to_v")):
            down = torch.randn(2, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, 2, generator=generator)
            if kind == "QwenImage":
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                state |= {f"{name}.alpha": torch.tensor(1.0)}
            else:
                state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(state, file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_lora_equals_the_pipelines(kind, folders, tmp_path):
    file = tmp_path / "lora.safetensors"
    small_lora(kind, folders[kind], file)
    options = {"use_resolution_binning": False} if kind == "Sana" else {}
    expected = reference(kind, folders[kind], 3, (64, 64), lora=file, **options)
    found, _ = draw(ours(kind, folders[kind], 3, (64, 64), lora=str(file)))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, draw(ours(kind, folders[kind], 3, (64, 64)))[0])


def test_sana_draws_at_a_trained_size_and_scales(tmp_path):
    folder = sana.save(tmp_path, sample_size=16)
    diffusion = ours("Sana", folder, 2, (96, 150))
    assert diffusion.latent_shape == (4, 12, 20)
    found, _ = draw(diffusion)
    assert found.shape == (2, 96, 150, 3)
    assert np.array_equal(found, reference("Sana", folder, 2, (96, 150)))


@pytest.mark.parametrize("kind", KINDS)
def test_words_beyond_what_the_pipeline_reads_are_named_and_have_no_effect(kind, folders):
    diffusion = ours(kind, folders[kind], 2, (64, 64))
    (tokenizer,) = diffusion.tokenizers.values()
    count = diffusion.token_limit(tokenizer) - tokenizer.num_special_tokens_to_add()
    text = ("a " + "z" * count)[: count - 3 if kind == "Sana" else count]  # "a" and its space are one token of Sana's
    while len(tokenizer(text, add_special_tokens=False).input_ids) < count:
        text += "z"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.encode([text, text[:-1] + "q"], [None, None])
    with pytest.warns(UserWarning, match=r"cut off: 'k'"):
        (states, *_), _ = (part.values() for part in diffusion.encode([text + "k"] * 2, [None] * 2))
    with pytest.warns(UserWarning, match=r"cut off: 'j'"):
        same = diffusion.encode([text + "j", text[:-1] + "qj"], [None] * 2)[0]["states"]
    assert torch.equal(same[0], states[0])
    assert not torch.equal(same[1], states[1])


def test_threads_that_decode_at_once_do_not_disturb_each_other(folders):
    diffusion = ours("QwenImage", folders["QwenImage"], 2, (64, 96))
    latents = torch.randn(24, 1, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [diffusion.decode(x0) for x0 in latents]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(torch.no_grad()(diffusion.decode), latents))
    assert all(map(torch.equal, together, alone))


def test_one_step_of_qwen_image_is_refused(folders):
    with pytest.raises(ValueError, match="too small"):
        ours("QwenImage", folders["QwenImage"], 1, (64, 96))


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("QwenImage", {"guidance_embeds": True}, "takes the guidance scale as an input"),
        ("QwenImage", {"zero_cond_t": True}, "zero_cond_t"),
        ("QwenImage", {"in_channels": 32}, "32 input channels"),
        ("Sana", {"guidance_embeds": True}, "takes the guidance scale as an input"),
        ("Sana", {"out_channels": 8}, "8 output channels"),
    ],
)
def test_other_kinds_of_models_are_refused_by_their_small_files(kind, changed, message, tmp_path):
    folder = KINDS[kind].save(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=message):
        AutoDiffusion.examine({"pretrained": folder})
