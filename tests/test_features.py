"""Deep features of a full evaluation, reused for a cheap one: equal where nothing changed, apart from the network."""

import copy
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svdd import UserError
from svdd.diffusion import features
from svdd.diffusion.chunking import Chunker
from svdd.diffusion.features import check, recording, reusing, share
from svdd.rewards.brightness import Brightness
from svdd.samplers.svdd import SVDD
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import FAMILIES
from tests.tiny_families.drawing import build

ONE_OF_A_KIND = ("Stable Diffusion 2.1", "SDXL", "PixArt-Sigma", "SD 3.5", "FLUX.1 dev", "FLUX.2 klein base")
NAMES = (*ONE_OF_A_KIND, "Qwen-Image", "Z-Image", "Sana")
DEPTHS = {"UNet2DConditionModel": 3, "FluxTransformer2DModel": 2, "Flux2Transformer2DModel": 2}  # the largest
TEXTS = ["a red apple on a wooden table", "panda", "dark and far away"]


@cache
def family(name):
    """Returns a tiny family; a transformer has blocks enough for a run in the middle."""
    (found,) = (family for family in FAMILIES if family.name == name)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusion = build(found, found.save(Path(folder)))
    network = getattr(diffusion, diffusion.backbone)
    deeper = {"num_layers": 4, "num_single_layers": 3, "n_layers": 4}
    if any(key in network.config for key in deeper):
        torch.manual_seed(0)
        config = {key: deeper.get(key, value) for key, value in network.config.items()}
        setattr(diffusion, diffusion.backbone, type(network).from_config(config).eval())
    return diffusion


def network_of(name):
    return getattr(family(name), family(name).backbone)


def on(diffusion, network):
    """Returns the family with another network."""
    other = copy.copy(diffusion)
    other.__dict__["_modules"] = {**diffusion._modules, diffusion.backbone: network}
    return other


@cache
def inputs(name):
    diffusion = family(name)
    with torch.no_grad():
        texts = diffusion.encode_texts(TEXTS)
    noise = torch.randn(2, 3, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise[0], noise[0] + 0.3 * noise[1], diffusion.kernel.timesteps[0], texts


def call(name, network, x, t, texts):
    return on(family(name), network).network(x, t, texts, 3.0)


def depths(name):
    return range(1, DEPTHS.get(type(network_of(name)).__name__, 1) + 1)


def snapshot(network):
    """Returns the attributes of all modules, with the entries of their dictionaries (weights, submodules, hooks)."""
    return [
        {key: dict(part) if isinstance(part, dict) else part for key, part in vars(module).items()}
        for module in network.modules()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_recording_is_the_network_and_reusing_its_outer_part(name):
    network, (x, other, t, texts) = network_of(name), inputs(name)
    before, weights = snapshot(network), {key: part.clone() for key, part in network.state_dict().items()}
    for depth in depths(name):
        full, new = (call(name, network, each, t, texts).detach() for each in (x, other))
        twin, store = recording(network, depth)
        assert torch.equal(call(name, twin, x, t, texts), full)
        assert all(len(feature) == len(x) and not feature.requires_grad for feature in store)
        torch.testing.assert_close(call(name, reusing(network, depth, store), x, t, texts), full, atol=1e-5, rtol=0)
        cheap = call(name, reusing(network, depth, store), other, t, texts)
        assert min((cheap - each).abs().amax((1, 2, 3)).min() for each in (full, new)) > 1e-5
        rows = torch.tensor([1, 0])  # without the longest text
        parts, few = {key: part[rows] for key, part in texts.items()}, [feature[rows] for feature in store]
        again = call(name, reusing(network, depth, few), other[rows], t, parts)
        torch.testing.assert_close(again, cheap[rows], atol=1e-5, rtol=0)
    assert snapshot(network) == before
    assert all(torch.equal(part, weights[key]) for key, part in network.state_dict().items())


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image", "SDXL"])
@torch.no_grad()
def test_chunks_of_rows_may_have_other_texts_and_threads_work_at_once(name):
    network, (x, _, t, texts) = network_of(name), inputs(name)
    keys = [*texts]

    def evaluate(twin, *parts):
        return call(name, twin, parts[0], t, dict(zip(keys, parts[1 : len(keys) + 1], strict=True)))

    def record(*parts):
        twin, store = recording(network, 1)
        return {"output": evaluate(twin, *parts), **{str(k): feature for k, feature in enumerate(store)}}

    def reuse(*parts):
        return evaluate(reusing(network, 1, parts[len(keys) + 1 :]), *parts)

    found = Chunker(1).map(record, 3, x, *texts.values())
    output, store = found.pop("output"), [*found.values()]
    given = (x, *texts.values(), *store)
    with ThreadPoolExecutor(3) as pool:
        in_threads = [*pool.map(lambda k: reuse(*(part[k : k + 1] for part in given)), [0, 1, 2] * 3)]
    torch.testing.assert_close(torch.cat(in_threads), output.repeat(3, 1, 1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(reuse(*given), output, atol=1e-5, rtol=0)


def test_a_twin_called_twice_stores_and_takes_the_features_of_each_call():
    name = "FLUX.1 dev"
    network, (x, other, t, texts) = network_of(name), inputs(name)
    twin, store = recording(network, 1)
    full = [call(name, twin, each, t, texts) for each in (x, other)]
    assert len(store) == 8  # of two lists of blocks, for two streams of tokens
    cheap = reusing(network, 1, store)
    for each, expected in zip((x, other), full, strict=True):
        torch.testing.assert_close(call(name, cheap, each, t, texts), expected, atol=1e-5, rtol=0)


def test_the_least_depth_of_a_unet_has_the_first_convolution_and_the_last_layer_alone():
    cheap = reusing(network_of("Stable Diffusion 2.1"), 1, [])
    parts = {name.partition(".")[0] for name, _ in cheap.named_parameters()}
    assert parts == {"conv_in", "time_embedding", "up_blocks", "conv_norm_out", "conv_out"}
    layers = {".".join(name.split(".")[:3]) for name, _ in cheap.up_blocks.named_parameters()}
    assert layers == {"0.resnets.0", "0.attentions.0"}


class Counted(ModelHook):
    def __init__(self):
        self.modules = []

    def pre_forward(self, module, *args, **kwargs):
        self.modules.append(module)
        return args, kwargs


def test_hooks_of_accelerate_see_the_network_itself():
    name = "Stable Diffusion 2.1"
    network, (x, _, t, texts) = network_of(name), inputs(name)
    full, hook = call(name, network, x, t, texts), Counted()
    add_hook_to_module(network, hook)
    try:
        twin, store = recording(network, 2)
        assert torch.equal(call(name, twin, x, t, texts), full)
        torch.testing.assert_close(call(name, reusing(network, 2, store), x, t, texts), full, atol=1e-5, rtol=0)
        assert share(family(name), 2) > 0
    finally:
        remove_hook_from_module(network)
    assert len(hook.modules) == 2
    assert all(module is network for module in hook.modules)


def test_a_network_whose_call_is_compiled_or_replaced():
    network = copy.copy(network_of("Stable Diffusion 2.1"))
    network._compiled_call_impl = None.__class__  # what compile() sets, which no twin may call
    x, _, t, texts = inputs("Stable Diffusion 2.1")
    twin, _ = recording(network, 1)
    assert call("Stable Diffusion 2.1", twin, x, t, texts).shape == x.shape
    network.forward = lambda *_, **__: None
    with pytest.raises(UserError, match="whose forward has been replaced"):
        check(network, 1)


def test_depths_out_of_range_are_named():
    for name, most in {"SDXL": 3, "FLUX.1 dev": 3, "Sana": 1}.items():
        for depth in (0, most + 1, True, 1.0):
            with pytest.raises(UserError, match=re.escape(f"must lie in 1 .. {most} for this")):
                check(network_of(name), depth)
        check(network_of(name), most)
    small = type(network_of("Sana")).from_config({**network_of("Sana").config, "num_layers": 2})
    with pytest.raises(UserError, match="too small to reuse features, with 2 blocks"):
        check(small, 1)
    with pytest.raises(UserError, match="a Linear cannot reuse features; expected a UNet, or a transformer with"):
        check(torch.nn.Linear(1, 1), 1)


@pytest.mark.parametrize("name", ["SDXL", "SD 3.5", "Z-Image"])
@torch.no_grad()
def test_shares_are_those_counted_on_the_network_itself(name):
    network, (x, _, t, _) = network_of(name), inputs(name)
    one = family(name).encode_texts([features._EXAMPLE])
    with torch.inference_mode():  # as in a run
        shares = [share(family(name), depth) for depth in depths(name)]
    assert all(low < high for low, high in zip([0, *shares], [*shares, 1], strict=True))
    twin, store = recording(network, 1)
    counts = []
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is not counted
        for evaluate in (lambda: twin, lambda: reusing(network, 1, store)):
            with FlopCounterMode(display=False) as counter:
                call(name, evaluate(), x[:1], t, one)
            counts.append(counter.get_total_flops())
    assert shares[0] == pytest.approx(counts[1] / counts[0], rel=1e-9)


@pytest.mark.parametrize("name", ["SDXL", "Qwen-Image"])
@torch.no_grad()
def test_svdd_with_feature_previews_costs_their_share_and_draws_each_image_apart(name):
    diffusion, steps, m = family(name), family(name).num_inference_steps, 3
    value = PosteriorMean(feature_depth=1)
    value.bind(Brightness(), diffusion)

    def draw(prompts, seeds):
        start = Start(diffusion, prompts, seeds)
        return SVDD(m)(start, value).images, start.context.ledger

    images, ledger = draw(TEXTS[:2], [5, 6])  # of texts of different length
    rows = 2 + (2 * share(diffusion, 1) * m + 2) * (steps - 1)
    assert (ledger.network_rows, ledger.denoiser_rows) == (pytest.approx(2 * rows), 2 * (1 + (m + 1) * (steps - 1)))
    alone, _ = draw(TEXTS[1:2], [6])
    torch.testing.assert_close(alone, images[1:], atol=1e-4, rtol=0)
    begun = Start(diffusion, TEXTS[:1], [7])
    begun.context.preview = value.preview
    children = begun(1).propose(m)
    assert (children.preview(value.preview) - children.x0).abs().amax((1, 2, 3)).min() > 1e-5
