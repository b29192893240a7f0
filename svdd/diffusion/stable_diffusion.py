"""Stable Diffusion 1.x and 2.x, and every model saved in the same pipeline format.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv 2112.10752.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.model_index import Configs
from svdd.diffusion.pipelines import expand, to_images

__all__ = ["LatentConsistency", "StableDiffusion", "check_unet", "embed_guidance"]

_UNET = "UNet2DConditionModel"
_DECODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")
_INPUTS = {  # by the name of a setting, the values that need no more than a prompt
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x or 2.x: epsilon, v or sample prediction, with classifier-free guidance."""

    pipeline = "StableDiffusionPipeline"
    tiny = "madebyollin/taesd"
    unet: Any
    vae: Any
    text_encoder: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        unet, vae, text = (configs.get(name, {}) for name in ("unet", "vae", "text_encoder"))
        if problem := check_unet(unet, vae):
            return problem
        for name, known in _INPUTS.items():
            if (found := unet.get(name)) not in known:
                return (
                    f"has a UNet with {name}={found!r}, which needs inputs other than a prompt; expected a plain UNet"
                )
        wide = "cross_attention_dim" if unet.get("encoder_hid_dim_type") is None else "encoder_hid_dim"
        read, width = unet.get(wide), text.get("hidden_size")
        if isinstance(read, int) and isinstance(width, int) and read != width:
            return (
                f"has a UNet for text states of width {read} and a text encoder of width {width}; expected one model's"
            )
        return ""

    @property
    def distilled(self) -> bool:
        """Whether the UNet has an embedding of the guidance scale, as in latent consistency models."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the text encoder."""
        return int(self.text_encoder.config.hidden_size)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return conditioning[0]["states"].mean(1)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, the text encoder's output, [p, tokens, d]."""
        tokenizer, encoder = self.tokenizers["tokenizer"], self.text_encoder
        tokens = tokenizer(expand(tokenizer, texts), padding="max_length", truncation=True, return_tensors="pt").to(
            self.device
        )
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return {"states": encoder(tokens.input_ids, attention_mask=mask)[0]}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the UNet."""
        scale = embed_guidance(self.unet, guidance_scale, x)
        return self.unet(x, t, encoder_hidden_states=texts["states"], timestep_cond=scale, return_dict=False)[0]

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        images = self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return to_images(images)


class LatentConsistency(StableDiffusion):
    """A latent consistency model: Stable Diffusion, distilled to few steps with the guidance scale as an input.

    Source: Luo et al., Latent Consistency Models, 2023, arXiv 2310.04378.
    """

    pipeline = "LatentConsistencyModelPipeline"
    kernels: ClassVar = {"lcm": DIFFUSION_KERNELS["lcm"], **DIFFUSION_KERNELS}
    default_steps = 4
    default_guidance = 8.5


def check_unet(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> str:
    """Returns what in the configurations of a UNet and an autoencoder is not text to image, or an empty string."""
    if (kind := unet.get("_class_name", _UNET)) != _UNET:
        return f"has a network of class {kind}; expected {_UNET}"
    if (kind := vae.get("_class_name", _DECODERS[0])) not in _DECODERS:
        return f"has an autoencoder of class {kind}; expected {' or '.join(_DECODERS)}"  # others draw noise
    latent = vae.get("latent_channels", 4)
    if (found := unet.get("in_channels", 4)) != latent:
        needs = "inpainting, editing and upscaling models need a picture as well"
        return f"has a UNet with {found} input channels and latents with {latent}: {needs}; expected text to image"
    if (found := unet.get("out_channels", 4)) != latent:
        return f"has a UNet with {found} output channels and latents with {latent}; expected as many"
    return ""


def embed_guidance(unet: Any, guidance_scale: float, x: Tensor) -> Tensor | None:
    """Returns what a UNet with an embedding of the guidance scale is told about it, a row for each of x; else None.

    That is sines and cosines of 1000 (w - 1) at frequencies 1 to 1/10000, computed as diffusers does.
    """
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (torch.tensor([guidance_scale - 1]) * 1000.0)[:, None] * rates
    embedding = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
    return embedding.to(x, non_blocking=True).expand(len(x), -1)
