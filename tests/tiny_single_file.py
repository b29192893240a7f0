"""A small Stable Diffusion in one file, under the names of the original code."""

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["original_names", "save_single_file"]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet(name: str, layers: int) -> str:
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if way == "down":
            start = f"input_blocks.{1 + block * (layers + 1) + (layers if kind == 'downsamplers' else layer)}"
            part = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        else:
            start = f"output_blocks.{block * (layers + 1) + (layers if kind == 'upsamplers' else layer)}"
            part = {"resnets": "0", "attentions": "1", "upsamplers": "1.conv"}[kind]
        rest = rest.removeprefix("conv.") if "samplers" in kind else rest
        name = f"{start}.{part}.{rest}"
    else:
        kind = "resnets" if "resnets" in name else ""
        name = next((name.replace(own, old, 1) for own, old in _OUTER.items() if name.startswith(own)), name)
    for own, old in _RESNET.items() if kind == "resnets" else ():
        name = name.replace(f".{own}.", f".{old}.")
    return f"model.diffusion_model.{name}"


def _vae(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    for own, old in _ATTENTION.items() if "attn_1" in name else ():
        name = name.replace(f".{own}.", f".{old}.")
    return f"first_stage_model.{name.replace('conv_norm_out', 'norm_out')}"


def original_names(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Returns the weights of a pipeline of Stable Diffusion 1.x under the names of the original code."""
    layers, blocks = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    state = {_unet(name, layers): tensor for name, tensor in pipe.unet.state_dict().items()}
    state |= {_vae(name, blocks): tensor for name, tensor in pipe.vae.state_dict().items()}
    text = pipe.text_encoder.state_dict().items()
    state |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def save_single_file(folder: str, file: Path) -> str:
    """Writes the weights of a saved pipeline into one file."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    save_file(original_names(pipe), file)
    return str(file)
