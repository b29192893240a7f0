"""Twins of networks: shallow copies in which a few submodules are replaced.

A twin shares all weights with its network, so that moves and conversions of the network hold for it, and takes
microseconds to make. Each call has its own: the network never changes, and several threads may work at once.
"""

import copy
import inspect
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdd import UserError

__all__ = ["blocks_of", "cut_unet", "is_unet", "record_runs", "record_state", "replace_runs", "twin_of"]

_LAYERED = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
_LISTS = ("transformer_blocks", "joint_transformer_blocks", "single_transformer_blocks", "layers")  # in their order
_OWN = (
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_orders: dict[tuple[type, str], "_Order"] = {}  # by a network's class and its list of blocks; learned by recording


def twin_of(module: Any) -> Any:
    """Returns a copy whose submodules and hooks can be replaced; its call is not compiled."""
    twin = copy.copy(module)
    for name in _OWN:
        twin.__dict__[name] = vars(module)[name].copy()
    replaced = twin.__dict__.pop("forward", None)  # a removed hook leaves the class's own behind
    if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
        if not hasattr(module, "_hf_hook"):
            what = f"a {type(module).__name__} whose forward has been replaced"
            raise UserError(f"{what} cannot reuse features; remove what replaced it, or leave out feature_depth")
        twin.forward = partial(_forward, twin, module)
    return twin


def _forward(twin: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Evaluates a twin within the module's own hook of accelerate, which moves the weights."""
    hook = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
        output = type(module).forward(twin, *args, **kwargs)
    return hook.post_forward(module, output)


def _check_depth(depth: int, most: int, what: str, network: nn.Module) -> None:
    kind = type(network).__name__
    if most < 1:
        raise UserError(f"this {kind} is too small to reuse features, with {what}; leave out feature_depth")
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= most:
        raise UserError(f"feature_depth must lie in 1 .. {most} for this {kind} with {what}, got {depth!r}")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a transformer, in the order of their calls; none if it has none of the known lists."""
    lists = [getattr(network, name, None) for name in _LISTS]
    return [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]


def is_unet(network: nn.Module) -> bool:
    """Whether a network has down and up blocks."""
    return hasattr(network, "down_blocks") and hasattr(network, "up_blocks")


def record_state(twin: Any, depth: int, store: list[Tensor]) -> None:
    """Makes the twin of a UNet store the state that enters a layer: the output of the layer before it."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        store.append(state.detach().clone())  # FreeU changes it in place

    k, j = _up_layer(twin, depth)
    blocks = list(twin.up_blocks)
    if j == 0:
        k -= 1
        blocks[k] = twin_of(blocks[k])
        blocks[k].register_forward_hook(keep)
    else:
        name = "attentions" if "attentions" in blocks[k]._modules else "resnets"
        blocks[k] = twin_of(blocks[k])
        layers = list(getattr(blocks[k], name))
        layers[j - 1] = twin_of(layers[j - 1])
        layers[j - 1].register_forward_hook(keep)
        blocks[k]._modules[name] = nn.ModuleList(layers)
    twin._modules["up_blocks"] = nn.ModuleList(blocks)


def cut_unet(twin: Any, depth: int, given: Iterator[Tensor]) -> None:
    """Leaves a twin the last up layers and the skip connections to them, and gives it the state that enters."""
    k, j = _up_layer(twin, depth)
    down, wanted = [], depth - 1  # skip connections besides that of the first convolution
    for block in twin.down_blocks:
        if wanted == 0:
            break
        layers = min(wanted, len(block.resnets))
        sampled = block.downsamplers is not None and wanted > layers
        down.append(_part(block, slice(layers), sampled))
        wanted -= layers + sampled
    twin._modules["down_blocks"] = nn.ModuleList(down)
    twin._modules["up_blocks"] = nn.ModuleList(
        [_part(twin.up_blocks[k], slice(j, None), True), *twin.up_blocks[k + 1 :]]
    )
    twin.mid_block = _Stored(given)


def _up_layer(network: Any, depth: int) -> tuple[int, int]:
    """Returns the place of the up layer of this depth, counted from the end: its block, and its place in that."""
    for kind in (type(block).__name__ for block in (*network.down_blocks, *network.up_blocks)):
        if kind not in _LAYERED:
            raise UserError(f"a UNet with a {kind} cannot reuse features; expected {', '.join(_LAYERED)}")
    places = [(k, j) for k, block in enumerate(network.up_blocks) for j in range(len(block.resnets))]
    _check_depth(depth, len(places) - 1, f"{len(places)} up layers", network)
    return places[-depth]


def _part(block: Any, part: slice, sampled: bool) -> Any:
    """Returns a twin of a block with some of its layers, with or without its downsampler."""
    twin = twin_of(block)
    for name in ("resnets", "attentions"):
        if name in twin._modules:
            twin._modules[name] = nn.ModuleList(list(twin._modules[name])[part])
    if not sampled and "downsamplers" in twin._modules:
        twin._modules["downsamplers"] = None
    return twin


class _Stored(nn.Module):
    """In place of the inner layers of a UNet: returns what they computed at the parent."""

    def __init__(self, given: Iterator[Tensor]) -> None:
        super().__init__()
        self.given = given

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Returns the next feature."""
        return next(self.given)


class _Order(NamedTuple):
    """How the outputs of a block continue its inputs."""

    sources: tuple[str | None, ...]  # the parameter that each output continues
    several: bool  # whether the block returns a tuple


def record_runs(twin: Any, depth: int, store: list[Tensor]) -> None:
    """Makes the twin of a transformer store what its runs of middle blocks add to their inputs."""
    for name, start, stop in _runs(twin, depth):
        _record_run(twin, name, start, stop, store)


def replace_runs(twin: Any, depth: int, given: Iterator[Tensor]) -> None:
    """Makes a twin add stored residuals where its runs of middle blocks were."""
    for name, start, stop in _runs(twin, depth):
        blocks = list(getattr(twin, name))
        residual = _Residual(type(blocks[start]), (type(twin), name), given)
        twin._modules[name] = nn.ModuleList([*blocks[:start], residual, *blocks[stop:]])


def _runs(network: nn.Module, depth: int) -> list[tuple[str, int, int]]:
    """Returns the run of middle blocks of the first and of the last list: its name, the first block and the end."""
    names = [name for name in _LISTS if isinstance(getattr(network, name, None), nn.ModuleList)]
    if not names:
        expected = f"a UNet, or a transformer with {', '.join(_LISTS)}"
        raise UserError(f"a {type(network).__name__} cannot reuse features; expected {expected}")
    first, last = names[0], names[-1]
    sizes = {name: len(getattr(network, name)) for name in names}
    most = (sizes[first] - 1) // 2 if first == last else max(sizes[first], sizes[last]) - 1
    _check_depth(depth, most, f"{' and '.join(map(str, sizes.values()))} blocks", network)
    starts, stops = {first: depth}, {last: sizes[last] - depth}
    runs = [(name, starts.get(name, 0), stops.get(name, sizes[name])) for name in dict.fromkeys((first, last))]
    return [(name, start, stop) for name, start, stop in runs if start < stop]


def _record_run(twin: Any, name: str, start: int, stop: int, store: list[Tensor]) -> None:
    """Stores the residual of one run.

    Which input an output continues is seen where a block hands its outputs to the next: behind the run or, where the
    list ends with the run, before it.
    """
    blocks, key = list(getattr(twin, name)), (type(twin), name)
    seen: dict[str, Any] = {}
    link = stop if stop < len(blocks) else start

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        seen["inputs"] = _named(type(block), args, kwargs)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        seen["output"] = output

    def connect(block: nn.Module, args: Any, kwargs: Any) -> None:
        output, several = seen["output"], isinstance(seen["output"], tuple)
        names = {id(part): name for name, part in _named(type(block), args, kwargs).items() if part is not None}
        sources = tuple(names.get(id(part)) for part in (output if several else (output,)))
        if not any(sources):
            raise UserError(f"a {key[0].__name__} cannot reuse features: its blocks do not continue one another")
        _orders[key] = _Order(sources, several)

    def finish(*_: Any) -> None:
        order = _orders[key]
        outputs = seen["output"] if order.several else (seen["output"],)
        for output, source in zip(outputs, order.sources, strict=True):
            if source is not None:
                store.append((output - seen["inputs"][source]).detach())
        seen.clear()

    for place in {start, stop - 1, link - 1, link}:
        blocks[place] = twin_of(blocks[place])
    blocks[link - 1].register_forward_hook(leave)
    blocks[link].register_forward_pre_hook(connect, with_kwargs=True)
    blocks[start].register_forward_pre_hook(enter, with_kwargs=True)
    if link == stop:
        blocks[link].register_forward_pre_hook(finish)
    else:
        blocks[stop - 1].register_forward_hook(leave)
        blocks[stop - 1].register_forward_hook(finish)
    twin._modules[name] = nn.ModuleList(blocks)


class _Residual(nn.Module):
    """In place of a run of blocks: adds to its inputs what the run added at the parent."""

    def __init__(self, block: type, key: tuple[type, str], given: Iterator[Tensor]) -> None:
        super().__init__()
        self.block, self.key, self.given = block, key, given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the last block of the run would."""
        order, inputs = _orders[self.key], _named(self.block, args, kwargs)
        outputs = tuple(name and _added(inputs[name], next(self.given)) for name in order.sources)
        return outputs if order.several else outputs[0]


def _added(state: Tensor, residual: Tensor) -> Tensor:
    """Returns their sum; batches whose longest texts differ differ in padding at the end."""
    spare = state.shape[1] - residual.shape[1]
    return state + (residual if spare == 0 else nn.functional.pad(residual, (0, 0, 0, spare)))


def _named(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a block by the names of its parameters."""
    return dict(zip(_parameters(block), args, strict=False)) | kwargs


@cache
def _parameters(block: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(block.forward).parameters)[1:]
