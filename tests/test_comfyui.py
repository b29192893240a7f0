"""The nodes for ComfyUI, with a stand-in for ComfyUI (`comfy_stub`) around models of svdd."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svdd import GuidedDiffusion, StableDiffusion, UserError
from svdd.diffusion import AutoDiffusion
from svdd.rewards import Brightness, CLIPScore, Colorfulness
from svdd.samplers import SVDD, BestOfN, Unguided
from tests.comfy_stub import loaded
from tests.tiny_families import sdxl

PACK = Path(__file__).parent.parent / "integrations" / "comfyui"
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
STEPS, CFG = 10, 3.0
MATCHING = ("ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": True})  # ComfyUI's schedule `simple`


@pytest.fixture(scope="module")
def pack():
    """The node pack, imported from its folder as ComfyUI does."""
    before, path = set(sys.modules), str(Path(__file__).parent / "comfy_stub")
    sys.path.insert(0, path)
    spec = importlib.util.spec_from_file_location("svdd_nodes_of_comfyui", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(path)
    for name in set(sys.modules) - before:
        if name.startswith(("comfy", "latent_preview", spec.name)):
            del sys.modules[name]


def wrapped(family, prompt, negative="blue", sampling=None) -> SimpleNamespace:
    """A model of svdd as ComfyUI's loaders and text encoders hand it to a node."""
    sampling = sampling or loaded.Discrete(family.kernel.scheduler)
    base = loaded.Model(family, sampling)
    texts = {"positive": loaded.conditioning(family, prompt), "negative": loaded.conditioning(family, negative)}
    return SimpleNamespace(base=base, inputs={"model": loaded.ModelPatcher(base), "vae": loaded.VAE(family), **texts})


@pytest.fixture(scope="module")
def panda():
    return wrapped(StableDiffusion("emoji", STEPS), "panda")


def draw(pack, wrapped, sampler, reward, count=1, **changes):
    """Runs the node in inference mode, as ComfyUI does."""
    shape = (count, *wrapped.base.family.latent_shape)
    options = {"seed": 7, "steps": STEPS, "cfg": CFG, "scheduler": "simple", "eta": 1.0, "denoise": 1.0, "budget": 0}
    options |= {"rows_at_once": 4, "prompt": "panda", "latent_image": {"samples": torch.zeros(shape)}}
    options |= {"reward": [(reward, 1.0)], "sampler": sampler}
    with torch.inference_mode():
        return pack.NODE_CLASS_MAPPINGS["SVDDGuidedKSampler"]().sample(**wrapped.inputs, **(options | changes))


def plain(family, sampler, reward, count=1):
    return GuidedDiffusion(reward, family, sampler).sample("panda", seed=7, num_images=count, negative_prompts="blue")[
        0
    ]


def assert_equal(images, expected, atol=2e-3):
    assert images.shape == (len(expected), *expected.shape[2:], 3)
    assert (images.movedim(-1, 1) - expected).abs().max() < atol


@pytest.mark.parametrize(("sampler", "eta"), [(Unguided(), 0.0), (SVDD(1), 1.0), (SVDD(3), 1.0)], ids=repr)
def test_pictures_equal_those_of_svdd(sampler, eta, pack, panda):
    family = StableDiffusion("emoji", STEPS, CFG, eta, *MATCHING)
    expected = plain(family, sampler, Brightness(), count=2)
    latent, images, _ = draw(pack, panda, sampler, Brightness(), count=2, eta=eta)
    assert_equal(images, expected)
    with torch.inference_mode():
        assert torch.allclose(panda.inputs["vae"].decode(latent["samples"]), images, atol=1e-5)


def test_pictures_of_sdxl_equal_those_of_svdd(pack, tmp_path):
    family = AutoDiffusion(sdxl.save(tmp_path), STEPS, CFG, 1.0, *MATCHING)
    expected = plain(family, SVDD(3), Brightness())
    model = wrapped(family, "panda")
    assert "pooled_output" in model.inputs["positive"][0][1]
    assert_equal(draw(pack, model, SVDD(3), Brightness())[1], expected)


def test_pictures_of_a_flow_model_equal_those_of_svdd(pack):
    family = AutoDiffusion("emoji-flow", STEPS, CFG)
    expected = plain(family, SVDD(3), Brightness())
    model = wrapped(family, "panda", sampling=loaded.Flow(family.kernel.config.shift))
    sigmas = torch.tensor([sigma for _, sigma in family.kernel.levels])
    chain = sys.modules["svdd_nodes_of_comfyui.chain"]
    guided = chain.GuidedSampler(Brightness(), SVDD(3), [], model.inputs.pop("vae"), "panda", [7], 1.0, 4, None)
    start = torch.zeros(1, *family.latent_shape)
    sys.modules["comfy.sample"].sample_custom(
        *(model.inputs["model"], start, CFG, guided, sigmas, model.inputs["positive"], model.inputs["negative"], start)
    )
    assert_equal(guided.drawn.images[0].movedim(1, -1), expected)


def test_an_image_starts_from_the_noise_that_comfyui_draws(pack, panda):
    panda.base.inputs.clear()
    draw(pack, panda, Unguided(), Brightness(), count=2, eta=0.0)
    noise = sys.modules["comfy.sample"].prepare_noise(torch.zeros(1, *panda.base.family.latent_shape), 7)
    scaled = panda.base.model_sampling.noise_scaling(panda.base.model_sampling.sigma_max, noise, 0, True)
    assert torch.allclose(panda.base.inputs[0][:1], scaled)


def test_guidance_raises_the_reward_at_the_counted_cost(pack, panda):
    scores, clip = {}, CLIPScore()
    comfy = sys.modules["comfy.utils"]
    for sampler in (Unguided(), SVDD(4)):
        panda.base.inputs.clear()
        comfy.updates.clear()
        _, images, report = draw(pack, panda, sampler, clip, count=2, held_out=[(Colorfulness(), 1.0)])
        scores[sampler] = clip.score(images.movedim(-1, 1), ["panda"] * 2)
        rows = sum(len(x) for x in panda.base.inputs)
        assert max(len(x) for x in panda.base.inputs) <= 8
        assert rows == 2 * 2 * (STEPS if isinstance(sampler, Unguided) else 1 + 4 * (STEPS - 1))
        assert f"{rows // 2} denoiser rows, {rows} network rows" in report
        lines = report.splitlines()
        assert lines[0] == repr(sampler)
        assert lines[1].split() == [
            "CLIPScore",
            *(f"{score:.4f}" for score in scores[sampler]),
            "mean",
            f"{scores[sampler].mean():.4f}",
        ]
        assert lines[2].startswith("Colorfulness ")
        assert comfy.updates == [(step, STEPS) for step in range(1, STEPS + 1)]
    before, after = scores.values()
    assert (after > before + 0.01).all()


def test_a_budget_sets_the_count(pack, panda):
    report = draw(pack, panda, SVDD(), Brightness(), budget=1 + 2 * (STEPS - 1))[2]
    assert report.splitlines()[0] == "SVDD(num_candidates=2)"


def test_patches_of_the_model_stay_in_force(pack, panda):
    seen = []
    patched = SimpleNamespace(base=panda.base, inputs={**panda.inputs, "model": panda.inputs["model"].clone()})
    patched.inputs["model"].set_model_sampler_post_cfg_function(lambda args: seen.append(1) or args["denoised"] * 0.5)
    images = draw(pack, patched, Unguided(), Brightness())[1]
    assert len(seen) == STEPS
    assert not torch.allclose(images, draw(pack, panda, Unguided(), Brightness())[1], atol=0.05)


def test_guidance_of_scale_1_computes_one_half(pack, panda):
    panda.base.inputs.clear()
    report = draw(pack, panda, Unguided(), Brightness(), cfg=1.0)[2]
    assert f"{STEPS} denoiser rows, {STEPS} network rows" in report
    assert len(panda.base.inputs) == STEPS


def test_the_interrupt_button_ends_the_sampling(pack, panda):
    management, calls = sys.modules["comfy.model_management"], []

    def press(args):
        calls.append(1)
        management.interrupt_current_processing(len(calls) == 3)
        return args["denoised"]

    pressed = SimpleNamespace(base=panda.base, inputs={**panda.inputs, "model": panda.inputs["model"].clone()})
    pressed.inputs["model"].set_model_sampler_post_cfg_function(press)
    with pytest.raises(management.InterruptProcessingException):
        draw(pack, pressed, SVDD(4), Brightness())
    assert len(calls) == 3


def test_images_start_from_their_own_latents(pack, panda):
    first, second = (draw(pack, panda, Unguided(), Brightness(), seed=seed)[0]["samples"] for seed in (1, 2))
    panda.base.inputs.clear()
    both, images, report = draw(
        *(pack, panda, SVDD(2), Brightness()),
        latent_image={"samples": torch.cat([first, second])},
        steps=4,
        denoise=0.4,
    )
    sigma = panda.base.model_sampling.sigmas[-1 - 600]
    start = panda.base.process_latent_in(first) + sigma * sys.modules["comfy.sample"].prepare_noise(first, 7)
    assert torch.allclose(panda.base.inputs[0], start, atol=1e-5)
    assert f"{2 * (1 + 2 * 3)} denoiser rows" in report
    alone, _, _ = draw(
        *(pack, panda, SVDD(2), Brightness()), latent_image={"samples": second}, steps=4, denoise=0.4, seed=8
    )
    assert torch.allclose(both["samples"][1:], alone["samples"], atol=1e-4)
    decoded = panda.inputs["vae"].decode(torch.cat([first, second]))
    own, other = (images - decoded).abs().mean(), (images - decoded.flip(0)).abs().mean()
    assert own < 0.7 * other


def test_a_batch_index_continues_a_batch(pack, panda):
    whole = draw(pack, panda, Unguided(), Brightness(), count=3)[1]
    samples = torch.zeros(1, *panda.base.family.latent_shape)
    one = draw(pack, panda, Unguided(), Brightness(), latent_image={"samples": samples, "batch_index": [2]})[1]
    assert torch.allclose(one, whole[2:], atol=1e-4)


def make(pack, node, *args, **kwargs):
    return pack.NODE_CLASS_MAPPINGS[node]().make(*args, **kwargs)[0]


def test_nodes_make_rewards_and_sums(pack):
    plain = make(pack, "SVDDReward", "CLIPScore", 1.0, "pretrained: emoji-judge")
    assert [(reward.name, weight) for reward, weight in plain] == [("CLIPScore-judge", 1.0)]
    both = make(pack, "SVDDReward", "Brightness", -0.5, "", plus=plain)
    total = sys.modules["svdd_nodes_of_comfyui.nodes"]._sum(both)
    images = torch.rand(3, 3, 64, 64)
    expected = plain[0][0].score(images, ["panda"] * 3) - 0.5 * Brightness().score(images, [""] * 3)
    assert torch.allclose(total.score(images, ["panda"] * 3), expected)
    ((above, _),) = make(pack, "SVDDReward", "Threshold", 1.0, '{"at_least": 0.4}', of=both[1:])
    assert above.name.startswith("Threshold")


def test_nodes_make_samplers(pack):
    assert repr(make(pack, "SVDDSampler", "SVDD", 0, 0.0, "")) == "SVDD()"
    tempered = make(pack, "SVDDSampler", "SVDD", 6, 0.1, "num_particles: 2")
    assert (tempered.num_candidates, tempered.alpha, tempered.num_particles) == (6, 0.1, 2)
    assert isinstance(make(pack, "SVDDSampler", "BestOfN", 3, 0.0, ""), BestOfN)


@pytest.mark.parametrize(
    ("node", "args", "message"),
    [
        ("SVDDReward", ("Brightnes", 1.0, ""), "unknown reward 'Brightnes'; .*did you mean 'Brightness'"),
        ("SVDDReward", ("FunctionReward", 1.0, "function: os.system"), "unknown reward 'FunctionReward'"),
        ("SVDDReward", ("os.system", 1.0, ""), "unknown reward 'os.system'"),
        ("SVDDReward", ("Threshold", 1.0, "{reward: os.system, at_least: 1}"), "expected a reward"),
        ("SVDDReward", ("HTTPReward", 1.0, "url: http://localhost"), "SVDD_COMFYUI_SERVERS=1"),
        ("SVDDReward", ("CLIPScore", 1.0, "pretraind: x"), "no argument 'pretraind'; did you mean 'pretrained'"),
        ("SVDDReward", ("CLIPScore", 1.0, "- 1"), "YAML or JSON with names"),
        ("SVDDSampler", ("SVDD", 0, 0.0, "num_candidates: 0"), "num_candidates must be >= 1"),
        ("SVDDSampler", ("SVDD", 4, 0.0, "num_candidates: 4"), "'num_candidates' is given twice"),
        ("SVDDSampler", ("BestOfN", 0, 0.5, ""), "BestOfN has no argument 'alpha'"),
        ("SVDDSampler", ("Unguided", 2, 0.0, ""), "Unguided has no count"),
        ("SVDDSampler", ("DPS", 0, 0.0, ""), "DPS needs gradients"),
    ],
)
def test_mistakes_get_one_clear_line(node, args, message, pack):
    with pytest.raises(UserError, match=message) as error:
        make(pack, node, *args)
    assert "\n" not in str(error.value)


def test_what_cannot_be_guided_is_refused(pack, panda):
    samples = torch.zeros(1, *panda.base.family.latent_shape)
    with pytest.raises(UserError, match="has a mask"):
        draw(pack, panda, SVDD(2), Brightness(), latent_image={"samples": samples, "noise_mask": samples})
    with pytest.raises(UserError, match=r"\[n, c, h, w\], got \[1, 16, 1, 8, 8\]"):
        draw(pack, panda, SVDD(2), Brightness(), latent_image={"samples": samples[:, :, None]})
    with pytest.raises(UserError, match="num_candidates=2 needs a chain with noise"):
        draw(pack, panda, SVDD(2), Brightness(), eta=0.0)
    states, options = panda.inputs["positive"][0]
    two = SimpleNamespace(base=panda.base, inputs={**panda.inputs, "positive": [[states.repeat(2, 1, 1), options]]})
    with pytest.raises(UserError, match="positive holds 2 prompts"):
        draw(pack, two, SVDD(2), Brightness())


def inputs_of(node) -> dict:
    given = node.INPUT_TYPES()
    assert given.keys() <= {"required", "optional"}
    return {**given["required"], **given.get("optional", {})}


def test_every_node_is_well_formed(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        inputs = inputs_of(node)
        parameters = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        del parameters["self"]
        assert list(parameters) == list(inputs)
        optional = node.INPUT_TYPES().get("optional", {})
        assert {name for name, each in parameters.items() if each.default is not each.empty} == optional.keys()
        for kind, options in ((each[0], each[1] if len(each) > 1 else {}) for each in inputs.values()):
            if isinstance(kind, list):
                assert options.get("default", kind[0]) in kind
                assert len(set(kind)) == len(kind) > 1
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"]
            else:
                assert kind in {"STRING", "MODEL", "VAE", "LATENT", "CONDITIONING", "SVDD_REWARD", "SVDD_SAMPLER"}
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) >= 1
        assert node.CATEGORY == "sampling/svdd"
        assert node.DESCRIPTION


CORE = {  # of ComfyUI's own nodes: inputs and outputs
    "CheckpointLoaderSimple": ({"ckpt_name": "COMBO"}, ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ["LATENT"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, []),
    "PreviewAny": ({"source": "*"}, []),
}


def interface(pack, name) -> tuple[dict, set, list]:
    """Returns types of the inputs, names of the required ones, and types of the outputs of a node."""
    if name in CORE:
        return CORE[name][0], set(CORE[name][0]), CORE[name][1]
    node = pack.NODE_CLASS_MAPPINGS[name]
    types = {each: "COMBO" if isinstance(kind[0], list) else kind[0] for each, kind in inputs_of(node).items()}
    return types, set(node.INPUT_TYPES()["required"]), list(node.RETURN_TYPES)


def check_value(pack, name, key, value):
    """Asserts that a widget's value is allowed."""
    if name in CORE:
        return
    kind, *options = inputs_of(pack.NODE_CLASS_MAPPINGS[name])[key]
    if isinstance(kind, list):
        assert value in kind
    elif kind in ("INT", "FLOAT"):
        assert options[0]["min"] <= value <= options[0]["max"]
    else:
        assert isinstance(value, str)


def test_the_api_workflow_fits_the_nodes(pack):
    flow = json.loads((PACK / "workflows" / "guided_api.json").read_text("utf-8"))
    for node in flow.values():
        types, required, _ = interface(pack, node["class_type"])
        assert required <= node["inputs"].keys() <= types.keys()
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                found = interface(pack, flow[source]["class_type"])[2][slot]
                assert types[key] in (found, "*"), key
            else:
                check_value(pack, node["class_type"], key, value)
    classes = {node["class_type"] for node in flow.values()}
    assert pack.NODE_CLASS_MAPPINGS.keys() <= classes


def test_the_workflow_of_the_editor_is_the_same(pack):
    flow = json.loads((PACK / "workflows" / "guided.json").read_text("utf-8"))
    api = json.loads((PACK / "workflows" / "guided_api.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert {str(number): node["type"] for number, node in nodes.items()} == {
        number: node["class_type"] for number, node in api.items()
    }
    links = {link[0]: link for link in flow["links"]}
    assert flow["last_link_id"] == max(links)
    assert flow["last_node_id"] == max(nodes)
    for number, node in nodes.items():
        types, _, outputs = interface(pack, node["type"])
        assert [(each["type"]) for each in node["outputs"]] == outputs
        inputs = dict(api[str(number)]["inputs"])
        for slot, each in enumerate(node["inputs"]):
            assert each["type"] == types[each["name"]]
            if each["link"] is not None:
                _, source, source_slot, target, target_slot, kind = links.pop(each["link"])
                assert (target, target_slot) == (number, slot)
                assert inputs.pop(each["name"]) == [str(source), source_slot]
                assert kind == nodes[source]["outputs"][source_slot]["type"]
                assert each["link"] in nodes[source]["outputs"][source_slot]["links"]
        values = node["widgets_values"]
        if "seed" in inputs:  # the editor adds what happens to the seed after a run
            assert values.pop([*inputs].index("seed") + 1) in ("fixed", "randomize")
        assert values == list(inputs.values())
        assert [key for key in types if key in inputs] == list(inputs)
    assert not links
