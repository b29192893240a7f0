"""Every model family against its pipeline, with every kind of sampler, and from the command line and a notebook."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from PIL import Image
from safetensors.torch import save_file

import svdd.diffusion
from svdd.__main__ import main
from svdd.diffusion.auto import from_pipeline
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.brightness import Brightness
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.budget import count
from svdd.samplers.dps import DPS
from svdd.samplers.noise_optimisation import NoiseOptimisation
from svdd.samplers.refinement import Refinement
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from svdd.samplers.zero_order_search import ZeroOrderSearch
from svdd.state.start import Start
from svdd.values.latent_conv import LatentConvValue
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import FAMILIES
from tests.tiny_families.drawing import GUIDANCE, NUM_STEPS, PROMPTS, SEEDS, Reference, build, draw

MODELS_PAGE = Path(__file__).parent.parent / "docs" / "reference" / "models.md"


def families(distinct):
    """Returns the first family of each kind that `distinct` tells apart."""
    return [*reversed({distinct(family): family for family in reversed(FAMILIES)}.values())]


CLASSES = families(lambda family: family.kind)
each_class = pytest.mark.parametrize("family", CLASSES, ids=lambda family: family.name)
each_cost = pytest.mark.parametrize(
    "family", families(lambda family: (family.kind, family.rows)), ids=lambda family: family.name
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns a function from a family to the folder of its small pipeline, which is saved once."""
    return cache(lambda family: family.save(tmp_path_factory.mktemp(family.module)))


@pytest.fixture(scope="session")
def reference(folder):
    """Returns a function from a family to its pipeline as diffusers loads it, once."""
    return cache(lambda family: Reference(family, folder(family)))


def conditions():
    """Yields laws of the steps and kinds of guidance: of the first model of a class all pairs of the first two laws."""
    for family in FAMILIES:
        known = GUIDANCE if family.negative else GUIDANCE[:2]
        for k, step in enumerate(family.steps):
            whole = family in CLASSES and k < 2
            for guidance in known if whole else [known[~k % len(known)]]:
                yield pytest.param(family, step, guidance, id=f"{family.name}: {step.name}: {guidance}")


@pytest.mark.parametrize(("family", "step", "guidance"), conditions())
def test_unguided_pictures_equal_the_pipelines(family, step, guidance, folder, reference):
    size = None if guidance == "guided" else family.size
    diffusion = build(family, folder(family), guidance, size, **step.ours)
    for images in (1, 3):
        expected = reference(family).draw(step, guidance, size, images)
        found = draw(diffusion, guidance, images)
        assert expected.std() > 0.01
        assert np.array_equal(found, expected)


@each_class
def test_pictures_equal_the_pipelines_when_several_threads_share_a_batch(family, folder, reference):
    """Rounding then depends on the place of a row in its batch."""
    diffusion, threads = (
        build(family, folder(family), "guided", family.size, **family.steps[0].ours),
        torch.get_num_threads(),
    )
    torch.set_num_threads(2)
    try:
        expected = reference(family).draw(family.steps[0], "guided", family.size, 3)
        found = draw(diffusion, "guided", 3)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(found, expected)


@each_class
def test_small_models_depend_on_all_that_they_are_told(family, folder):
    """Otherwise equal pictures would say little."""
    guided, plain = (build(family, folder(family), guidance) for guidance in ("guided", "none"))
    prompt = PROMPTS[0]

    @torch.no_grad()
    def picture(diffusion, text, negative=None):
        return Unguided()(Start(diffusion, [text], [0], [negative]), PosteriorMean()).images

    own = picture(guided, prompt)
    others = [picture(guided, prompt[:-1] + "y"), picture(plain, prompt)]
    others += [picture(guided, prompt, "dark")] if family.negative else []
    assert all((other - own).abs().max() > 1e-3 for other in others)


def test_every_family_is_in_the_table_of_the_documentation_and_one_file_below_200_lines():
    section = MODELS_PAGE.read_text(encoding="utf-8").partition("\n## Parity")[2]
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", section, re.MULTILINE)
    assert rows == [(family.name, family.kind) for family in FAMILIES]
    for family in FAMILIES:
        file = inspect.getfile(getattr(svdd.diffusion, family.kind))
        assert len(Path(file).read_text(encoding="utf-8").splitlines()) < 200


@each_class
def test_every_precision_of_the_trainer_draws_the_same_picture_up_to_its_rounding(family, folder):
    """Weights are read in it; the types are those of the pipeline, whatever the default type of new tensors is."""

    def drawn(plugin, **options):
        diffusion = build(family, folder(family), parity=False, **family.steps[0].ours | options)
        model = plugin.convert_module(GuidedDiffusion(Brightness(), diffusion, Unguided()))
        with torch.inference_mode(), plugin.forward_context():
            return model.draw(PROMPTS[:1], SEEDS[:1]).images

    exact = drawn(Precision())
    for half, dtype, tolerance in (("16", "float16", 0.02), ("bf16", "bfloat16", 0.1)):
        for plugin, options in (
            (HalfPrecision(f"{half}-true"), {"dtype": dtype}),
            (MixedPrecision(f"{half}-mixed", "cpu"), {}),
        ):
            images = drawn(plugin, **options)
            assert images.dtype == torch.float32
            assert 0 < (images - exact).abs().mean() < tolerance, plugin.precision


# ---- samplers


@pytest.fixture(scope="session")
def chain(folder):
    """Returns a function from a family to its class, with guidance and its own transition, in reproducible mode."""
    return cache(lambda family: build(family, folder(family), reproducible=True))


def posterior_mean(diffusion):
    value = PosteriorMean()
    value.bind(Brightness(), diffusion)
    return value


def learned(diffusion):
    """Returns a learned value with the weights that training starts from."""
    value = LatentConvValue(channels=8, num_blocks=1)
    value.bind(Brightness(), diffusion)
    value.set_units(torch.tensor([0.4, 0.6]), torch.ones(NUM_STEPS))
    return value.eval()


@pytest.mark.parametrize(
    ("sampler", "value", "rows", "backward"),
    [
        (Unguided(), posterior_mean, NUM_STEPS, 0),
        (BestOfN(2), posterior_mean, 2 * NUM_STEPS, 0),
        (SVDD(2), posterior_mean, 1 + 2 * (NUM_STEPS - 1), 0),
        (SVDD(3), learned, NUM_STEPS, 0),
        (SMC(2), posterior_mean, 2 * NUM_STEPS, 0),
        (ZeroOrderSearch(1, 2), posterior_mean, (1 + 2) * NUM_STEPS, 0),
        (Refinement(1, 0.4, sampler=BestOfN(2)), posterior_mean, 2 * (NUM_STEPS + round(0.4 * NUM_STEPS)), 0),
        (NoiseOptimisation(2), posterior_mean, 2 * NUM_STEPS, 1),
        (DPS(), posterior_mean, NUM_STEPS, 1),
        (TwistedSMC(2, alpha=0.1), posterior_mean, 2 * NUM_STEPS, 2),
    ],
    ids=lambda each: type(each).__name__ if hasattr(each, "sample") else getattr(each, "__name__", None),
)
@each_cost
def test_every_sampler_works_at_its_stated_cost_and_keeps_images_apart(family, sampler, value, rows, backward, chain):
    diffusion = chain(family)
    value = value(diffusion)
    sampler.check(diffusion, value)
    with torch.no_grad():
        final = sampler(Start(diffusion, PROMPTS[:2], SEEDS[:2]), value)
        alone = sampler(Start(diffusion, PROMPTS[1:2], SEEDS[1:2]), value)
        assert torch.equal(alone.x[0], final.x[1])
        assert torch.equal(alone.images[0], final.images[1])
    spent = final.context.ledger.per_image(2)
    noisy = sum(diffusion.std(i) > 0 for i in range(NUM_STEPS))
    assert spent["denoiser_rows"] == rows
    assert spent["network_rows"] == rows * family.rows
    assert spent["gradient_rows"] == backward * (noisy if isinstance(sampler, DPS) else NUM_STEPS)
    cost = count(sampler, diffusion, value)
    assert (cost.denoiser_rows, cost.gradient_rows) == (spent["denoiser_rows"], spent["gradient_rows"])


@each_cost
def test_rows_are_independent_up_to_rounding_in_the_fast_mode(family, folder):
    """Here with another law of the steps than the pipeline's: GLASS, for flow models at the levels of DDIM."""
    diffusion = build(family, folder(family), scheduler="ddim", inner_steps=2)
    value = posterior_mean(diffusion)
    with torch.no_grad():
        together = SVDD(2)(Start(diffusion, PROMPTS[:2], SEEDS[:2]), value)
        for k in range(2):
            alone = SVDD(2)(Start(diffusion, PROMPTS[k : k + 1], SEEDS[k : k + 1]), value)
            torch.testing.assert_close(alone.x[0], together.x[k], atol=1e-4, rtol=1e-4)
    rows = 1 + 2 * 2 * (NUM_STEPS - 1) + 2  # of a candidate 2, of the last ones 1, for M = 2
    assert together.context.ledger.network_rows == 2 * family.rows * rows


# ---- loading


def arguments(family, step):
    """Returns what our class is given, beyond the model, for the pictures of `Reference.draw` with guidance."""
    size = dict(zip(("height", "width"), family.own_size or (), strict=False))
    return {"num_inference_steps": NUM_STEPS, family.argument: family.guidance[0], **size, **family.ours, **step.ours}


@pytest.mark.parametrize(
    ("family", "process"),
    [*((family, False) for family in CLASSES), pytest.param(CLASSES[-1], True, marks=pytest.mark.slow)],
    ids=lambda each: getattr(each, "name", "process" if each else "here"),
)
def test_the_command_line_draws_the_pictures_of_any_folder(family, process, folder, reference, tmp_path):
    prompts, run, step = tmp_path / "prompts.jsonl", tmp_path / "run", family.steps[0]
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(PROMPTS[:2], SEEDS, strict=False)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"pretrained": folder(family), "parity": True, **arguments(family, step)}
    words = [
        *("predict", "--output", str(run), "--data.prompts", str(prompts), "--data.batch_size", "2"),
        *(word for name, value in options.items() for word in (f"--model.diffusion.{name}", str(value))),
        *("--model.reward", "Brightness", "--model.sampler", "Unguided"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    ]
    done = subprocess.run([sys.executable, "-m", "svdd", *words]).returncode if process else main(words)
    assert done == 0
    expected = reference(family).draw(step, "guided", None, 2)
    for index, picture in enumerate((expected * 255).round().astype("uint8")):
        assert np.array_equal(np.asarray(Image.open(run / "images" / f"{index:06d}-00.png")), picture)


@each_class
def test_a_pipeline_object_draws_the_same_pictures_beside_us_and_afterwards(family, reference):
    step, theirs = family.steps[0], reference(family)
    expected = theirs.draw(step, "guided", None, 3)
    diffusion = from_pipeline(theirs.pipe, **arguments(family, step))
    assert np.array_equal(draw(diffusion, "guided", 3), expected)
    GuidedDiffusion(Brightness(), diffusion, BestOfN(2)).sample(PROMPTS[:2])
    assert np.array_equal(theirs.draw(step, "guided", None, 3), expected)


def test_the_notebook_cell_of_the_documentation_guides_a_pipeline_with_additions(sd21, tmp_path, monkeypatch):
    """The cell stands in a folder with the model and the files that it names, and its second half runs twice."""
    pytest.importorskip("peft")
    (cell,) = re.findall(r"^```py\n(.*?)^```$", MODELS_PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd21, "my-model")
    generator, layer = torch.Generator().manual_seed(0), "unet.down_blocks.0.attentions.0.proj_in"
    halves = {"A": torch.randn(4, 16, generator=generator), "B": torch.randn(16, 4, generator=generator)}
    lora = {f"{layer}.lora_{letter}.weight": half for letter, half in halves.items()}
    save_file(lora, "my-lora.safetensors")
    save_file({"<toy>": torch.randn(2, 16, generator=generator)}, "my-word.safetensors")
    names: dict = {}
    load, guide = cell.split("\nmodel = ")
    exec(load, names)
    pipe, prompt = names["pipe"], "a <toy> on a table"

    def picture():
        random = torch.Generator().manual_seed(SEEDS[0])
        return pipe([prompt], num_inference_steps=3, generator=[random], output_type="np").images

    expected = picture()
    for _ in range(2):
        exec(f"model = {guide}", names)
        assert names["images"].shape == (1, 3, 64, 64)
        assert np.array_equal(picture(), expected)
    diffusion = from_pipeline(pipe, num_inference_steps=3, eta=0.0)
    with torch.no_grad():
        found = Unguided()(Start(diffusion, [prompt], SEEDS[:1]), PosteriorMean()).images
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
    pipe.unload_lora_weights()
    assert not np.array_equal(picture(), expected)
