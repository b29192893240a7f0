"""The memory that large models need: weights, one guided step and the decoder, computed without allocating any.

Models are built from their published configurations and run on fake tensors, whose storages are counted while they
live. On the embedded model, the count is compared with real allocations. Writes benchmarks/memory.md.
"""

import argparse
import weakref
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import clip, kl, qwen3, qwen25_vl, sd35_transformer, sdxl_unet, t5
from svdd.assets.hub import ASSETS

GIB = 2**30
CANDIDATES = 4
CHUNKS = (1, 4)
CARDS = (24, 48, 80)
SPARE = 1.0  # GiB of a card for CUDA itself
SCRATCH = 1.25  # what operations need, in units of what they return: see `check`
Run = Callable[[nn.Module, int], Any]  # evaluates a network or decoder on some rows


class LivePeak(TorchDispatchMode):
    """Counts the bytes of all storages that exist at once among the results of operations; keeps the maximum.

    Args:
        dtype: Of the tensors that count; by default all.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.now, self.most = dtype, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the storages that it made; views and weights are no new ones."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            counts = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if counts and self.dtype in (None, tensor.dtype):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        return result

    def ignore(self, module: nn.Module) -> None:
        """Leaves out the weights of a module, of which some operations return views."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Model(NamedTuple):
    """What is published of a model, at 1024 x 1024 pixels."""

    network: Callable[[], nn.Module]
    evaluate: Run  # on rows of the network
    pairs: bool  # whether a guided row takes two rows of the same call
    decoder: Callable[[], nn.Module]
    decode: Run
    encoders: dict[str, Callable[[], nn.Module]]
    upcast: bool = False  # whether the autoencoder runs in float32


def decode(channels: int, vae: Any, n: int) -> Tensor:
    """Decodes n latents of 128 x 128."""
    return vae.decode(torch.randn(n, channels, 128, 128), return_dict=False)[0]


def run_sdxl(unet: Any, n: int) -> Tensor:
    """Two encoders of 77 tokens, pooled text and six numbers on the size."""
    added = {"text_embeds": torch.randn(n, 1280), "time_ids": torch.randn(n, 6)}
    return unet(torch.randn(n, 4, 128, 128), 500, torch.randn(n, 77, 2048), added_cond_kwargs=added)[0]


def run_sd35(transformer: Any, n: int) -> Tensor:
    """77 tokens of CLIP and 256 of T5."""
    return transformer(torch.randn(n, 16, 128, 128), torch.randn(n, 333, 4096), torch.randn(n, 2048), torch.ones(n))[0]


def run_flux(transformer: Any, n: int) -> Tensor:
    """512 tokens of T5, 64 x 64 patches, and the scale of guidance as an input."""
    ids = {"img_ids": torch.randn(4096, 3), "txt_ids": torch.randn(512, 3)}
    scalars = {"timestep": torch.ones(n), "guidance": torch.ones(n), "pooled_projections": torch.randn(n, 768)}
    return transformer(torch.randn(n, 4096, 64), torch.randn(n, 512, 4096), **ids, **scalars)[0]


def run_qwen(transformer: Any, n: int) -> Tensor:
    """512 tokens, 64 x 64 patches; guidance takes two calls, one after the other."""
    shapes = [[(1, 64, 64)]] * n
    return transformer(torch.randn(n, 4096, 64), torch.randn(n, 512, 3584), None, torch.ones(n), img_shapes=shapes)[0]


def run_z_image(transformer: Any, n: int) -> list[Tensor]:
    """512 tokens."""
    latents, texts = list(torch.randn(n, 16, 1, 128, 128)), list(torch.randn(n, 512, 2560))
    return transformer(latents, torch.ones(n), texts)[0]


def decode_qwen(vae: Any, n: int) -> Tensor:
    """Decodes n latents, as films of one frame."""
    return vae.decode(torch.randn(n, 16, 1, 128, 128), return_dict=False)[0]


CLIP_L, CLIP_G = partial(clip, False, False), partial(clip, True, True)
MODELS = {
    "SDXL": Model(
        sdxl_unet, run_sdxl, True, partial(kl, 4), partial(decode, 4), {"CLIP-L": CLIP_L, "CLIP-G": CLIP_G}, True
    ),
    "SD 3.5 Large": Model(
        *(sd35_transformer, run_sd35, True, partial(kl, 16), partial(decode, 16)),
        {"CLIP-L": CLIP_L, "CLIP-G": CLIP_G, "T5": t5},
    ),
    "FLUX.1-dev": Model(
        *(partial(FluxTransformer2DModel, guidance_embeds=True), run_flux, False),
        *(partial(kl, 16), partial(decode, 16), {"CLIP-L": CLIP_L, "T5": t5}),
    ),
    "Z-Image": Model(
        *(ZImageTransformer2DModel, run_z_image, True, partial(kl, 16), partial(decode, 16), {"Qwen3": qwen3}),
    ),
    "Qwen-Image": Model(
        *(QwenImageTransformer2DModel, run_qwen, False, AutoencoderKLQwenImage, decode_qwen),
        {"Qwen2.5-VL": qwen25_vl},
    ),
}


def weights(module: nn.Module) -> float:
    """Returns the GiB of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) / GIB


@torch.no_grad()
def computed(module: nn.Module, run: Run, rows: int) -> float:
    """Returns the largest GiB of what a call allocates, inputs included and weights not; for fake tensors."""
    with LivePeak() as peak:
        peak.ignore(module)
        _ = run(module, rows)
    return peak.most / GIB


@torch.no_grad()
def allocated(module: nn.Module, run: Run, rows: int) -> float:
    """Returns the same of a real call, from the allocator of the CPU, scratch memory of kernels included."""
    _ = run(module, rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _ = run(module, rows)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(totals) / GIB


class Table(NamedTuple):
    """The numbers of a model, in GiB."""

    network: float  # weights
    vae: float
    encoders: dict[str, float]
    step: dict[int, float]  # beyond weights, by chunk_size
    decoded: dict[int, float]


def examine(model: Model) -> Table:
    """Builds the parts of a model one after another and finds their memory."""
    network = model.network().eval()
    size, step = weights(network), {n: computed(network, model.evaluate, n * (1 + model.pairs)) for n in CHUNKS}
    del network
    torch.set_default_dtype(torch.float32 if model.upcast else torch.bfloat16)
    vae = model.decoder().eval()
    decoded = {n: computed(vae, model.decode, n) for n in CHUNKS}
    torch.set_default_dtype(torch.bfloat16)
    encoders = {name: weights(build()) for name, build in model.encoders.items()}
    return Table(size, weights(vae), encoders, step, decoded)


def peaks(table: Table, chunk: int) -> dict[str, tuple[float, str]]:
    """Returns the largest memory of the device, and the card, by `offload`; of one image drawn by SVDD, M = 4."""
    network, vae, encoders = table.network, table.vae, [(size, 0.0) for size in table.encoders.values()]
    kept = 2 * CANDIDATES * 3 * 1024**2 * 4 / GIB  # decoded images, float32, and their concatenation
    step, decoded = table.step[chunk], table.decoded[chunk] + kept
    all_weights, both = network + vae + sum(table.encoders.values()), network + vae
    moments = {  # weights on the device, and what an operation needs besides
        "none": [(all_weights, step), (all_weights, decoded)],
        "text_encoders": [(both, step), (both, decoded), *((both + size, rest) for size, rest in encoders)],
        "model": [(network, step), (vae, decoded), *encoders],
    }
    return {mode: (max(map(sum, found)), card(found)) for mode, found in moments.items()}


def card(moments: list[tuple[float, float]]) -> str:
    """Returns the smallest card that holds so much, with a margin."""
    most = max(held + SCRATCH * rest for held, rest in moments) + SPARE
    return next((f"{size} GB" for size in CARDS if most <= size), "none")


def report(tables: dict[str, Table]) -> list[str]:
    """Returns the page."""
    lines = [
        "# Memory of large models",
        "",
        "Computed: networks from their published configurations, run on fake tensors with",
        "fused attention; bfloat16, 1024 x 1024 pixels, one image, SVDD with M = 4 and `PosteriorMean`, without the",
        "reward's own model; SDXL's autoencoder in float32. GiB (2^30 bytes). Made by `python -m benchmarks.memory`.",
        "",
        "| model | network | autoencoder | text encoders | all weights | the same in float32 |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, table in tables.items():
        total = table.network + table.vae + sum(table.encoders.values())
        encoders = ", ".join(f"{each} {size:.2f}" for each, size in table.encoders.items())
        wide = 2 * total - (table.vae if MODELS[name].upcast else 0)
        lines.append(f"| {name} | {table.network:.2f} | {table.vae:.2f} | {encoders} | {total:.1f} | {wide:.1f} |")
    lines += [
        "",
        "What the network and the decoder need beyond the weights, by `chunk_size`, and the peak of the device by",
        f"`offload`, with the smallest card of 24, 48 and 80 GB that holds {SPARE} GiB more, for CUDA itself, and",
        f"{SCRATCH} times what is no weight, for scratch memory.",
        "",
        "| model | chunk_size | network | decoder | offload: none | text_encoders | model |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for name, table in tables.items():
        for chunk in CHUNKS:
            all_of = " | ".join(f"{gib:.1f}: {fits}" for gib, fits in peaks(table, chunk).values())
            lines.append(f"| {name} | {chunk} | {table.step[chunk]:.2f} | {table.decoded[chunk]:.2f} | {all_of} |")
    return lines


def check() -> list[str]:
    """Returns a section that compares the method with real allocations, on the embedded model."""
    folder, lines = str(ASSETS / "emoji-sd"), []
    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    size, channels, width = unet.config.sample_size, unet.config.in_channels, unet.config.cross_attention_dim

    def run_unet(network: Any, n: int) -> Tensor:
        return network(torch.randn(n, channels, size, size), 500, torch.randn(n, 77, width))[0]

    def run_vae(network: Any, n: int) -> Tensor:
        return network.decode(torch.randn(n, channels, size, size), return_dict=False)[0]

    lines += [
        "",
        "The method against PyTorch's profiler, on the embedded model in float32 on the CPU, in MiB. The difference is",
        "scratch memory within kernels, which fake tensors do not show; on a GPU it depends on the kernels chosen.",
        "",
        "| | rows | computed | allocated |",
        "|---|---:|---:|---:|",
    ]
    for name, module, run in (("network", unet, run_unet), ("decoder", vae, run_vae)):
        for n in CHUNKS:
            with FakeTensorMode():
                fake = computed(type(module).from_config(module.config).eval(), run, n)
            lines.append(f"| {name} | {n} | {1024 * fake:.2f} | {1024 * allocated(module, run, n):.2f} |")
    return lines


def main() -> None:
    """Computes, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    checked, tables = check(), {}
    torch.set_default_dtype(torch.bfloat16)
    for name in options.models:
        with FakeTensorMode():
            tables[name] = examine(MODELS[name])
        print(name, tables[name], flush=True)
    text = "\n".join(report(tables) + checked) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
