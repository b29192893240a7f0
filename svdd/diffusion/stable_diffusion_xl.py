"""Stable Diffusion XL, and the models distilled from it that keep its pipeline format (Turbo, Lightning, LCM).

Source: Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, 2023, arXiv
2307.01952.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdd.assets.hub import quiet
from svdd.diffusion.arithmetic import without_autocast
from svdd.diffusion.family import Conditioning
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs, to_images
from svdd.diffusion.stable_diffusion import check_unet, embed_guidance

__all__ = ["StableDiffusionXL"]

_TIME_IDS = 6  # original height and width, top and left of the crop, target height and width


class StableDiffusionXL(LatentDiffusion):
    """Stable Diffusion XL: two text encoders, and the picture's size as an input of the network."""

    pipeline = "StableDiffusionXLPipeline"
    tiny = "madebyollin/taesdxl"
    default_guidance = 5.0
    unet: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        unet, vae = (configs.get(name, {}) for name in ("unet", "vae"))
        texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
        if problem := check_unet(unet, vae):
            return problem
        if unet and (found := unet.get("addition_embed_type")) != "text_time":
            return f"has a UNet with addition_embed_type={found!r}; expected 'text_time', as in SDXL"
        if not texts:
            return ""
        width, pooled = unet.get("addition_time_embed_dim"), texts[-1].get("projection_dim")
        read = unet.get("projection_class_embeddings_input_dim")
        if width and pooled and read and (found := (read - pooled) / width) != _TIME_IDS:
            other = "a refiner, which works on pictures, reads an aesthetic score"
            return f"has a UNet that reads {found:g} numbers besides texts; expected {_TIME_IDS} ({other})"
        read, widths = unet.get("cross_attention_dim"), [text.get("hidden_size", 0) for text in texts]
        if isinstance(read, int) and all(widths) and read != sum(widths):
            found = " and ".join(str(width) for width in widths)
            return f"has a UNet for text states of width {read} and text encoders of {found}; expected one model's"
        return ""

    @property
    def distilled(self) -> bool:
        """Whether the UNet has an embedding of the guidance scale, as in latent consistency models."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the pooled text."""
        return int(self.pipe.text_encoder_2.config.projection_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the pooled text of each prompt, [p, d]."""
        return conditioning[0]["pooled"]

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Conditioning:
        """Encodes texts; where there is no negative prompt, its embeddings are zeros if the model says so."""
        positive, negative = super().encode(prompts, negative_prompts)
        if negative is not None and not self.negative_prompt and self.pipe.config.force_zeros_for_empty_prompt:
            missing = torch.tensor([text is None for text in negative_prompts], device=self.device).nonzero()[:, 0]
            negative = {name: part.index_fill(0, missing, 0) for name, part in negative.items()}
        return positive, negative

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, the last but one layers of both encoders, [p, tokens, d], and `pooled`, [p, d]."""
        with quiet("diffusers"):
            states, _, pooled, _ = self.pipe.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
        return {"states": states, "pooled": pooled}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the UNet."""
        states, (height, width) = texts["states"], self.latent_shape[1:]
        size = [height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor]
        numbers = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=x.device).repeat(len(x), 1)
        return self.unet(
            x,
            t,
            encoder_hidden_states=states,
            timestep_cond=embed_guidance(self.unet, guidance_scale, x),
            added_cond_kwargs={"text_embeds": texts["pooled"], "time_ids": numbers},
            return_dict=False,
        )[0]

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        config, latents = self.vae.config, x0.to(self.vae.dtype)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(part).view(1, -1, 1, 1) for part in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        kind = x0.device.type
        upcast = config.get("force_upcast") and torch.get_autocast_dtype(kind) == torch.float16
        with without_autocast(kind, wanted=bool(upcast)):
            return to_images(self.vae.decode(latents, return_dict=False)[0])

    def take_parts(self, what: str, lora: bool) -> None:
        """Takes the pipeline's parts; a pipeline object keeps its autoencoder, so one that would overflow is copied."""
        super().take_parts(what, lora)
        if self.borrowed and self._overflows:
            copy = type(self.vae).from_config(self.vae.config).to(self.device).eval()
            copy.load_state_dict(self.vae.state_dict())
            copy.use_slicing, copy.use_tiling = self.vae.use_slicing, self.vae.use_tiling
            self.__dict__["vae"] = copy

    def upcast(self) -> None:
        """Returns an autoencoder that would overflow in float16 to float32."""
        if self._overflows:
            self.vae.float()

    @property
    def _overflows(self) -> bool:
        """Whether the autoencoder's weights are in float16, in which it says that it overflows."""
        return self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
