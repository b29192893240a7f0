"""Deep features of a network, recorded at a parent latent and reused for a cheap evaluation of its candidates.

A candidate differs from its parent by one step's noise. A full evaluation of the parent records what the deep layers
compute; for a candidate, only the outer layers are computed again.

Source: Ma et al., DeepCache: Accelerating Diffusion Models for Free, 2023, arXiv 2312.00858, who reuse a UNet's deep
features from one denoising step to the next. Passing them from a parent to its candidates is an addition of ours, as is
the form for transformers, which reuses the residual of the middle blocks.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from svdd.assets.hub import quiet
from svdd.diffusion.twins import cut_unet, is_unet, record_runs, record_state, replace_runs, twin_of

__all__ = ["check", "recording", "reusing", "share"]

_EXAMPLE = "a photo of a red apple"
_shares: dict[Any, float] = {}


def check(network: nn.Module, depth: int) -> None:
    """Raises UserError if the network has no such depth, or no layers of a kind whose features can be reused."""
    recording(network, depth)
    reusing(network, depth, [])


def recording(network: nn.Module, depth: int) -> tuple[nn.Module, list[Tensor]]:
    """Returns a twin whose call is the network's own, bit for bit, and the list to which its calls append features.

    A feature has one row per row of the call. Where a family cuts texts to the longest of a batch, dimension 1 has
    another length in another batch; to join such features, pad them with zeros at the end. A network compiled as a
    whole is evaluated without compilation.

    Args:
        network: A `UNet2DConditionModel`, or a transformer of diffusers.
        depth: As in `reusing`.
    """
    network = _plain(network)
    store: list[Tensor] = []
    twin = twin_of(network)
    (record_state if is_unet(network) else record_runs)(twin, depth, store)
    return twin, store


def reusing(network: nn.Module, depth: int, features: Sequence[Tensor]) -> nn.Module:
    """Returns a twin that computes the outer layers and takes the rest from features, in the order of its calls.

    Args:
        network: As in `recording`.
        depth: Layers or blocks that are computed at either end. A UNet computes its first convolution and the
            `depth` - 1 layers behind it, and its last `depth` layers: 1 is the least, layers_per_block + 1 the whole
            outer resolution. A transformer computes its first and last `depth` blocks, and adds the residual of those
            between.
        features: What a recording twin of this depth has stored, one row per row of the call.
    """
    network = _plain(network)
    twin = twin_of(network)
    (cut_unet if is_unet(network) else replace_runs)(twin, depth, iter(features))
    return twin


@torch.no_grad()
def share(family: Any, depth: int) -> float:
    """Returns the share of a network row's floating-point operations that a reusing evaluation costs, 0 to 1.

    Counted for one row of the family's latent shape and a text of ordinary length, on tensors without storage. Only a
    network with an operation that does not work on those is evaluated itself, on one row.

    Args:
        family: A `ModelFamily`.
        depth: As in `reusing`.
    """
    network: Any = _plain(getattr(family, family.backbone))
    check(network, depth)
    key = (type(network), repr(sorted(network.config.items(), key=str)), depth, tuple(family.latent_shape))
    if key not in _shares:
        arguments = _arguments(family, network)
        try:
            _shares[key] = _count(_without_storage(network), depth, *tree_map(_to_meta, arguments))
        except (NotImplementedError, RuntimeError, TypeError):
            with sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is not counted
                _shares[key] = _count(network, depth, *arguments)
    return _shares[key]


def _count(network: nn.Module, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    whole, store = recording(network, depth)
    with FlopCounterMode(display=False) as full:
        whole(*args, **kwargs)
    with FlopCounterMode(display=False) as outer:
        reusing(network, depth, store)(*args, **kwargs)
    return outer.get_total_flops() / full.get_total_flops()


def _arguments(family: Any, network: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns what the family gives to its network for one row."""
    probe, given = twin_of(network), []

    def note(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        raise _Noted

    probe.forward = note
    other = copy.copy(family)
    other.__dict__["_modules"] = {name: part for name, part in family._modules.items() if name != family.backbone}
    other.__dict__[family.backbone] = probe
    with quiet("diffusers", "transformers"):
        texts = family.encode_texts([_EXAMPLE])
    family.release()
    x = torch.zeros(1, *family.latent_shape, dtype=family.dtype, device=family.device)
    with suppress(_Noted):
        other.network(x, family.kernel.timesteps[0].to(x.device), texts, family.guidance_scale)
    return given[0]


class _Noted(Exception):
    """Ends a call of which only the arguments are wanted."""


def _to_meta(part: Any) -> Any:
    return part.to("meta") if isinstance(part, Tensor) else part


def _without_storage(network: nn.Module) -> nn.Module:
    """Returns a copy of a network whose weights have nothing but a shape."""
    weights = {id(tensor): _to_meta(tensor) for tensor in (*network.parameters(), *network.buffers())}
    hooks = {id(module._hf_hook): False for module in network.modules() if hasattr(module, "_hf_hook")}
    copied = copy.deepcopy(network, weights | hooks)
    for module in copied.modules():
        if "_hf_hook" in vars(module):  # of accelerate, which would move the weights
            del module.forward, module._hf_hook, module._old_forward
    return copied


def _plain(network: nn.Module) -> nn.Module:
    """Returns the network inside of what `torch.compile` returns."""
    return getattr(network, "_orig_mod", network)
