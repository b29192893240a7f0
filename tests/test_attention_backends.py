"""Attention backends: the same outputs by other kernels, in one network only, and one line for what is impossible."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from svdd import UserError
from svdd.diffusion.attention import set_backend
from svdd.diffusion.auto import AutoDiffusion, from_pipeline
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import FAMILIES

TEXTS = ["a red apple on a wooden table", "panda"]
DISPATCHED = {"FLUX.1 dev", "FLUX.2 klein base", "Qwen-Image", "Z-Image"}  # ask diffusers' dispatcher
OTHERS = {"Stable Diffusion 1.5", "SD 3.5", "Sana"}  # call PyTorch's function


class Kernels(TorchDispatchMode):
    """Notes PyTorch's kernels for attention, but for the one that consists of other operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names |= {name for name in [function.__name__] if "attention" in name}
        return function(*args, **(kwargs or {}))


def evaluated(diffusion):
    """Returns x0 of the first step, and the names of the kernels."""
    noise = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = diffusion.encode(TEXTS, [None, None])
        with Kernels() as kernels:
            return diffusion.denoise(noise, 0, conditioning, torch.arange(2)).x0, kernels.names


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.name in DISPATCHED | OTHERS], ids=lambda f: f.name
)
def test_other_kernels_give_the_same_output(family, tmp_path):
    active, folder = _AttentionBackendRegistry._active_backend, family.save(tmp_path)
    height, width = family.own_size or (None, None)
    arguments = {**family.ours, "num_inference_steps": 2, "height": height, "width": width}
    plain, other = (AutoDiffusion(folder, attention_backend=name, **arguments) for name in (None, "_native_math"))
    assert plain.chunker.concurrent
    assert not other.chunker.concurrent  # the choice holds for all threads
    (expected, kernels), (found, none) = evaluated(plain), evaluated(other)
    assert kernels
    assert not none
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    network = getattr(plain, plain.backbone)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert plain.fingerprints() == other.fingerprints()
    set_backend(network, "native")
    again, same = evaluated(plain)
    assert torch.equal(again, expected)
    assert same == kernels
    assert _AttentionBackendRegistry._active_backend == active  # of all other networks
    refusals = {"flash": "install `flash-attn", "sage": "install `sageattention", "xformers": "install `xformers"}
    for name, text in (refusals | {"nativ": "is unknown; expected flash, .*did you mean 'native'"}).items():
        with pytest.raises(UserError, match=f"attention_backend='{name}'.*{text}"):
            set_backend(network, name)
    if family.name in OTHERS:
        more = ", xformers" if plain.backbone == "unet" else ""
        listed = f"expected native, _native_flash, _native_efficient, _native_math, _native_cudnn{more}$"
        with pytest.raises(
            UserError, match=f"attention_backend='flex' is impossible in a {type(network).__name__}; {listed}"
        ):
            set_backend(network, "flex")


def test_what_a_device_cannot_compute_is_named_before_anything_is_drawn(sd15):
    chosen = "_native_efficient"  # CUDA only
    start = Start(StableDiffusion(sd15, 2, attention_backend=chosen), ["a"], [1])
    expected = "cannot compute the attention of this UNet2DConditionModel on cpu in float32: No viable backend"
    with pytest.raises(UserError, match=f"attention_backend='{chosen}' {expected}"):
        Unguided()(start, PosteriorMean())


def test_a_missing_package_is_named_before_files_are_read():
    for call in (StableDiffusion, lambda name, **options: StableDiffusion.examine({"pretrained": name, **options})):
        with pytest.raises(UserError, match="attention_backend='sage': Sage Attention backend 'sage' is not usable"):
            call("no-such-folder/at-all", attention_backend="sage")


def test_a_pipeline_object_keeps_its_own(sd15):
    pipe = StableDiffusion(sd15, 2).pipe
    with pytest.raises(UserError, match="attention_backend: a pipeline object has been loaded already; set this on"):
        from_pipeline(pipe, attention_backend="native")
    for options in ({"attention_backend": "native"}, {"compile": True}):
        with pytest.raises(UserError, match="change a pipeline object: set them on the pipeline"):
            StableDiffusion(pipe, 2, **options)


def test_a_backend_without_gradients_is_not_differentiated(sd15):
    diffusion = StableDiffusion(sd15, 2)
    diffusion.attention_backend = "sage"
    conditioning, row = diffusion.encode(["a"], [None]), torch.zeros(1, dtype=torch.int64)
    x = torch.zeros(1, *diffusion.latent_shape, requires_grad=True)
    with pytest.raises(UserError, match="attention_backend='sage' has no gradient, which this sampler needs"):
        diffusion.denoise(x, 0, conditioning, row)
    assert diffusion.denoise(x.detach(), 0, conditioning, row).x0.isfinite().all()
