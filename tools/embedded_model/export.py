"""Assembles the trained parts into the folders that ship: emoji-sd, emoji-clip, emoji-judge, emoji-flow; fp16 on disk.

What is not in the folder of the training runs stays as it is.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.embedded_model.clip import MEAN, STD, CLIPTraining, build_tokenizer
from tools.embedded_model.flow import trained_parts
from tools.embedded_model.unet import SCHEDULER, UNetTraining
from tools.embedded_model.vae import export_vae

__all__ = ["export_clip", "export_diffusion", "export_flow", "flow_pipeline"]

SHIFT = 1.0  # of the times of emoji-flow


def export_diffusion(work: Path, folder: Path) -> None:
    """Writes the diffusers pipeline: averaged UNet, autoencoder, the CLIP's text tower, tokenizer, DDIM scheduler.

    Args:
        work: Folder of the training runs.
        folder: Takes the pipeline.
    """
    training = UNetTraining()
    training.load_state_dict(_weights(work / "unet/last.ckpt"))
    pipeline = StableDiffusionPipeline(
        vae=export_vae(work / "vae/last.ckpt", work),
        text_encoder=_text_tower(work),
        tokenizer=build_tokenizer(work),
        unet=training.average.eval(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    _declare_float32(folder / "text_encoder")


def export_clip(work: Path, name: str, folder: Path) -> None:
    """Writes one CLIP with its tokenizer and image processor.

    Args:
        work: Folder of the training runs.
        name: A key of `ARCHITECTURES`.
        folder: Takes the model.
    """
    tokenizer = build_tokenizer(work)
    _clip(work, name).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    _declare_float32(folder)


def export_flow(average: Path, assets: Path) -> None:
    """Writes emoji-flow.

    Args:
        average: Averaged weights of the training.
        assets: Folder with emoji-sd and emoji-clip; takes `emoji-flow`.
    """
    folder = assets / "emoji-flow"
    flow_pipeline(average, assets).to(dtype=torch.float16).save_pretrained(folder)
    for part in ("text_encoder", "text_encoder_2"):
        _declare_float32(folder / part)


def flow_pipeline(average: Path, assets: Path) -> StableDiffusion3Pipeline:
    """Returns the pipeline of emoji-flow: trained parts, emoji-sd's autoencoder, emoji-clip's text tower, no T5.

    Args:
        average: Averaged weights of the training.
        assets: Folder with emoji-sd and emoji-clip.
    """
    parts = trained_parts()
    parts.load_state_dict(load_file(average))
    text = CLIPTextModelWithProjection.from_pretrained(assets / "emoji-clip", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(assets / "emoji-sd/vae", shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(assets / "emoji-sd/tokenizer")
    return StableDiffusion3Pipeline(
        transformer=parts["transformer"].eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        text_encoder_2=parts["text_encoder_2"].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _text_tower(work: Path) -> CLIPTextModel:
    clip = _clip(work, "clip")
    text = CLIPTextModel(clip.config.text_config)
    prefix = "text_model." if any(key.startswith("text_model.") for key in text.state_dict()) else ""
    text.load_state_dict({f"{prefix}{key}": value for key, value in clip.text_model.state_dict().items()})
    return text.eval()


def _clip(work: Path, name: str) -> CLIPModel:
    training = CLIPTraining(name, build_tokenizer(work))
    training.load_state_dict(_weights(work / name / "last.ckpt"))
    return training.clip.eval()


def _weights(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]


def _declare_float32(folder: Path) -> None:
    """Names float32 in the configuration, so that transformers loads the fp16 file in float32."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path("svdd/assets"))
    arguments = parser.parse_args()
    if (arguments.work / "unet/last.ckpt").exists():
        export_diffusion(arguments.work, arguments.assets / "emoji-sd")
    if (arguments.work / "flow/average.safetensors").exists():
        export_flow(arguments.work / "flow/average.safetensors", arguments.assets)
    for model in ("clip", "judge"):
        if (arguments.work / model / "last.ckpt").exists():
            export_clip(arguments.work, model, arguments.assets / f"emoji-{model}")
