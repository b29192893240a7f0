"""Counted floating-point operations of the parts of SD 1.5 and SDXL, and of evaluations that reuse deep features.

Writes benchmarks/flops.md. The parts are built from the published configurations on PyTorch's meta device, so that
nothing is downloaded or computed.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.shapes import kl, sd15_unet, sdxl_unet
from svdd.diffusion.features import recording, reusing

__all__ = ["SHAPES", "flops"]

SHAPES = {"sd15": "SD 1.5, 512 px", "sdxl": "SDXL, 1024 px"}
_UNETS: dict[str, Callable[[], Any]] = {"sd15": sd15_unet, "sdxl": sdxl_unet}
_SIDES = {"sd15": 64, "sdxl": 128}  # of a latent
_CLIP: dict[str, dict[str, int]] = {
    "reward_clip": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14},
    "reward_clip_b32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32},
}


def _count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


@cache
def flops(shape: str) -> dict[str, Any]:
    """Returns the counted floating-point operations of the parts of a model, two for a multiplication with addition.

    Args:
        shape: One of `SHAPES`.

    Returns:
        `network_row`, one row through the UNet without guidance; `decode` and `tiny_decode`, one image; `reward_clip`
        and `reward_clip_b32`, the image towers of CLIP ViT-L/14 and ViT-B/32 on one image of 224 px; and `share`, for
        each depth the share of a network row that an evaluation with reused features costs.
    """
    side = _SIDES[shape]
    with torch.device("meta"):
        unet, vae = _UNETS[shape](), kl(4)
        tiny = AutoencoderTiny()
        towers = {
            name: CLIPVisionModelWithProjection(CLIPVisionConfig(num_attention_heads=part["hidden_size"] // 64, **part))
            for name, part in _CLIP.items()
        }
        x, pixels = torch.zeros(1, 4, side, side), torch.zeros(1, 3, 224, 224)
        texts = torch.zeros(1, 77, unet.config.cross_attention_dim)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if shape == "sdxl" else None

    def row(network: Any) -> int:
        return _count(network, x, torch.tensor(500, device="meta"), texts, added_cond_kwargs=added)

    whole, shares = row(unet), {}
    for depth in range(1, sum(len(block.resnets) for block in unet.up_blocks)):
        twin, store = recording(unet, depth)
        row(twin)
        shares[depth] = row(reusing(unet, depth, store)) / whole
    decoders: dict[str, Callable[[Tensor], Any]] = {"decode": vae.decode, "tiny_decode": tiny.decoder}
    return {
        "network_row": whole,
        **{name: _count(decoder, x) for name, decoder in decoders.items()},
        **{name: _count(tower, pixels) for name, tower in towers.items()},
        "share": shares,
    }


def main() -> None:
    """Counts, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    counted = {shape: flops(shape) for shape in SHAPES}
    parts = {
        "network_row": "UNet, one row (two with guidance)",
        "decode": "decoder of the autoencoder",
        "tiny_decode": "decoder of AutoencoderTiny (TAESD)",
        "reward_clip": "CLIP ViT-L/14, image of 224 px",
        "reward_clip_b32": "CLIP ViT-B/32, image of 224 px",
    }
    heads = " | ".join(SHAPES.values())
    lines = [
        "# Counted operations",
        "",
        "Floating-point operations, two for a multiplication with addition, of matrix products, convolutions and "
        "attention, counted by `torch.utils.flop_counter` on the published configurations. Made by "
        "`python -m benchmarks.flops`.",
        "",
        f"| GFLOP | {heads} |",
        "|---|---:|---:|",
        *(f"| {what} | {' | '.join(f'{counted[s][key] / 1e9:.1f}' for s in SHAPES)} |" for key, what in parts.items()),
        "",
        "With `feature_depth`, a candidate's evaluation computes the first convolution and the `depth` - 1 layers "
        "behind it, and the last `depth` layers of the UNet. The share of a full row that it costs:",
        "",
        f"| depth | {heads} |",
        "|---:|---:|---:|",
    ]
    for depth in range(1, 1 + max(len(counted[shape]["share"]) for shape in SHAPES)):
        shares = [counted[shape]["share"].get(depth) for shape in SHAPES]
        lines.append(f"| {depth} | {' | '.join('' if found is None else f'{found:.1%}' for found in shares)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
