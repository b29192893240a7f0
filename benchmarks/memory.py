"""The memory that large models need: weights, one guided step and the decoder, computed without allocating any.

Models are built from their published configurations and run on fake tensors, whose storages are counted while they
live. With `--device cuda` the networks and decoders are run for real as well, with random weights, and the two are
compared. Writes benchmarks/memory.md.
"""

import argparse
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

GIB = 2**30
CANDIDATES = 4
CHUNKS = (1, 4)
CARDS = (24, 48, 80)
SPARE = 1.0  # GiB of a card for CUDA's own use and what the allocator cannot fill
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


def clip(large: bool) -> nn.Module:
    """The text towers of CLIP ViT-L/14 and of OpenCLIP ViT-bigG/14."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    if large:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
    config = CLIPTextConfig(**sizes, num_hidden_layers=32 if large else 12)
    return CLIPTextModelWithProjection(config) if large else CLIPTextModel(config)


def t5() -> nn.Module:
    """The encoder of T5 v1.1 XXL."""
    shape = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **shape))


def qwen3() -> nn.Module:
    """Qwen3 4B, without its head."""
    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    return Qwen3Model(Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, **shape))


def qwen25_vl() -> nn.Module:
    """Qwen2.5-VL 7B, with its vision tower and its head, as Qwen-Image holds it."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def sdxl_unet() -> nn.Module:
    """The UNet of SDXL."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd35_transformer() -> nn.Module:
    """The transformer of Stable Diffusion 3.5 Large."""
    return SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def kl(channels: int) -> nn.Module:
    """The autoencoder of SDXL (4 channels), and of SD3, FLUX.1 and Z-Image (16)."""
    quantised = channels == 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
        sample_size=1024,
    )


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


CLIP_L, CLIP_G = partial(clip, False), partial(clip, True)
MODELS = {
    "SDXL": Model(sdxl_unet, run_sdxl, True, partial(kl, 4), partial(decode, 4), {"CLIP-L": CLIP_L, "CLIP-G": CLIP_G}),
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
def measured(module: nn.Module, run: Run, rows: int) -> float:
    """Returns the same from CUDA's allocator."""
    _ = run(module, rows)  # loads kernels and their workspaces
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _ = run(module, rows)
    return (torch.cuda.max_memory_allocated() - before) / GIB


class Table(NamedTuple):
    """The numbers of a model, in GiB."""

    network: float  # weights
    vae: float
    encoders: dict[str, float]
    step: dict[int, float]  # beyond weights, by chunk_size
    decoded: dict[int, float]


def examine(model: Model, of: Callable[[nn.Module, Run, int], float], with_encoders: bool = True) -> Table:
    """Builds the parts of a model one after another and finds their memory."""
    network = model.network().eval()
    size, step = weights(network), {n: of(network, model.evaluate, n * (1 + model.pairs)) for n in CHUNKS}
    del network
    vae = model.decoder().eval()
    decoded = {n: of(vae, model.decode, n) for n in CHUNKS}
    encoders = {name: weights(build()) for name, build in model.encoders.items()} if with_encoders else {}
    return Table(size, weights(vae), encoders, step, decoded)


def peaks(table: Table, chunk: int) -> dict[str, float]:
    """Returns the largest memory of the device by the setting of `offload`, when one image is drawn by SVDD, M = 4."""
    network, vae, encoders = table.network, table.vae, table.encoders
    kept = 2 * CANDIDATES * 3 * 1024**2 * 4 / GIB  # decoded images, float32, and their concatenation
    step, decoded = table.step[chunk], table.decoded[chunk] + kept
    return {
        "none": network + vae + sum(encoders.values()) + max(step, decoded),
        "text_encoders": network + vae + max(step, decoded, *encoders.values()),
        "model": max(network + step, vae + decoded, *encoders.values()),
    }


def card(gib: float) -> str:
    """Returns the smallest card that holds so much."""
    return next((f"{size} GB" for size in CARDS if gib + SPARE <= size), "none of them")


def report(tables: dict[str, Table]) -> list[str]:
    """Returns the page."""
    lines = [
        "# Memory of large models",
        "",
        "Computed, not measured on a card: networks from their published configurations, run on fake tensors with",
        "fused attention; bfloat16, 1024 x 1024 pixels, one image, SVDD with M = 4 and `PosteriorMean`, without the",
        "reward's own model. GiB (2^30 bytes). Made by `python -m benchmarks.memory`.",
        "",
        "| model | network | autoencoder | text encoders | all weights | the same in float32 |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, table in tables.items():
        total = table.network + table.vae + sum(table.encoders.values())
        encoders = ", ".join(f"{each} {size:.2f}" for each, size in table.encoders.items())
        lines.append(f"| {name} | {table.network:.2f} | {table.vae:.2f} | {encoders} | {total:.1f} | {2 * total:.1f} |")
    lines += [
        "",
        "What the network and the decoder need beyond the weights, by `chunk_size`, and the peak of the device by",
        f"`offload`. A card fits if {SPARE} GiB stay free for CUDA itself.",
        "",
        "| model | chunk_size | network | decoder | offload: none | text_encoders | model |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for name, table in tables.items():
        for chunk in CHUNKS:
            all_of = " | ".join(f"{gib:.1f}: {card(gib)}" for gib in peaks(table, chunk).values())
            lines.append(f"| {name} | {chunk} | {table.step[chunk]:.2f} | {table.decoded[chunk]:.2f} | {all_of} |")
    return lines


def compare(tables: dict[str, Table]) -> list[str]:
    """Returns a section on the same calls on a real device."""
    lines = [
        "",
        f"The same calls on {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, with random weights: peak of",
        "CUDA's allocator beyond the weights, and the computed number in brackets.",
        "",
        "| model | network, chunk 1 | chunk 4 | decoder, chunk 1 | chunk 4 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, table in tables.items():
        with torch.device("cuda"):
            real = examine(MODELS[name], measured, with_encoders=False)
        pairs = [(real.step[n], table.step[n]) for n in CHUNKS] + [(real.decoded[n], table.decoded[n]) for n in CHUNKS]
        lines.append(f"| {name} | " + " | ".join(f"{one:.2f} ({other:.2f})" for one, other in pairs) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Computes, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: measure as well")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    tables = {}
    for name in options.models:
        with FakeTensorMode():
            tables[name] = examine(MODELS[name], computed)
        print(name, tables[name], flush=True)
    lines = report(tables) + (compare(tables) if options.device == "cuda" else [])
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
