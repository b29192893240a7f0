"""Qwen-Image: a flow model whose text encoder is Qwen2.5-VL.

Source: Wu et al., Qwen-Image Technical Report, 2025, arXiv 2508.02324.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs, to_images
from svdd.diffusion.texts import dynamic_shift, masked_mean, pad_states, trim_states

__all__ = ["QwenImage"]

_DECODING = threading.Lock()  # the autoencoder keeps features of the frame in itself, and threads decode several images


class QwenImage(LatentDiffusion):
    """Qwen-Image, with classifier-free guidance in two calls of the network.

    Guidance keeps the length of the conditional output: each patch of the guided one is scaled to it. The scale is the
    pipeline's `true_cfg_scale`.
    """

    pipeline = "QwenImagePipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    default_steps, default_guidance = 50, 4.0
    two_calls, patch = True, 2
    max_tokens = 512  # after the beginning of the pipeline's template
    transformer: Any
    text_encoder: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        network, vae = configs.get("transformer", {}), configs.get("vae", {})
        if network.get("guidance_embeds"):
            return "has a transformer that takes the guidance scale as an input; expected one without guidance_embeds"
        for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if network.get(name):
                return f"has a transformer with {name}, which needs pictures or layers as well; expected text to image"
        if (found := network.get("in_channels", 64)) != (expected := 4 * vae.get("z_dim", 16)):
            return f"has a transformer with {found} input channels; expected {expected}, 4 for each of its latents"
        return ""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of a latent; the pipeline's has an axis for its one frame as well."""
        factor = self.pipe.vae_scale_factor
        return (self.vae.config.z_dim, height // factor, width // factor)

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens that fit between those of the template that are dropped and the last."""
        before = self.pipe.prompt_template_encode.partition("{}")[0]
        return self.max_tokens + self.pipe.prompt_template_encode_start_idx - len(tokenizer(before).input_ids)

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns evenly spaced noise levels and their shift, which depends on the size of the picture."""
        count, (_, height, width) = self.num_inference_steps, self.latent_shape
        mu = dynamic_shift(config, height * width // 4)
        return {"sigmas": np.linspace(1.0, 1 / count, count), "mu": mu}

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the text encoder."""
        return int(self.transformer.config.joint_attention_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return masked_mean(**conditioning[0])

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, the text encoder's output, [p, 512, d], and `mask`, true for real tokens."""
        states, mask = self.pipe.encode_prompt(list(texts), device=self.device, max_sequence_length=self.max_tokens)
        return pad_states(states, mask, self.max_tokens)

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer on patches of 2 x 2 latents."""
        states, mask = trim_states(**texts)
        n, _, height, width = x.shape
        output = self.transformer(
            hidden_states=self._pack(x),
            timestep=t.expand(n).to(x.dtype) / 1000,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        return self._unpack(output, height, width)

    def combine(self, negative: Tensor, positive: Tensor, guidance_scale: float, t: Tensor) -> Tensor:
        """Returns uncond + w (cond - uncond), each patch scaled to the norm of cond."""
        height, width = positive.shape[2:]
        conditional = self._pack(positive)
        guided = self._pack(super().combine(negative, positive, guidance_scale, t))
        length, own = (torch.norm(part, dim=-1, keepdim=True) for part in (conditional, guided))
        return self._unpack(guided * (length / own), height, width)

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder on one frame, with each channel's mean and standard deviation."""
        x0, config = x0.to(self.vae.dtype)[:, :, None], self.vae.config
        mean, deviation = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(x0.device, x0.dtype, non_blocking=True)
            for numbers in (config.latents_mean, config.latents_std)
        )
        with _DECODING:
            images = self.vae.decode(x0 / (1.0 / deviation) + mean, return_dict=False)[0]
        return to_images(images[:, :, 0])

    def _pack(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x, *x.shape)

    def _unpack(self, patches: Tensor, height: int, width: int) -> Tensor:
        factor = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(patches, height * factor, width * factor, factor)[:, :, 0]
