"""FLUX.1 dev and schnell, and every model saved in the same pipeline format.

Source: Black Forest Labs, FLUX, 2024, github.com/black-forest-labs/flux.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdd import is_integer, require_numbers
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs, to_images
from svdd.diffusion.texts import dynamic_shift

__all__ = ["Flux"]


class Flux(LatentDiffusion):
    """FLUX.1: the dev model takes the guidance scale as an input, one network row; schnell has no guidance.

    Args:
        true_cfg_scale: Weight of FLUX.1's classifier-free guidance with the negative prompts, which doubles the network
            rows; at 1 or less it is not computed. Independent of guidance_scale, the network's input.
        max_sequence_length: Tokens that the T5 text encoder reads, at most 512; schnell is meant for 256.
    """

    pipeline = "FluxPipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    tiny = "madebyollin/taef1"
    default_steps, default_guidance = 28, 3.5
    two_calls, patch = True, 2
    transformer: Any

    def __init__(self, *args: Any, true_cfg_scale: float = 1.0, max_sequence_length: int = 512, **kwargs: Any) -> None:
        require_numbers(true_cfg_scale=true_cfg_scale)
        if not math.isfinite(true_cfg_scale):
            raise ValueError(f"true_cfg_scale must be a finite number, got {true_cfg_scale}")
        if not is_integer(max_sequence_length) or not 1 <= max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length must be an integer in 1 .. 512, got {max_sequence_length!r}")
        self.true_cfg_scale, self.max_sequence_length = true_cfg_scale, max_sequence_length
        super().__init__(*args, **kwargs)

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        found, latent = configs.get("transformer", {}).get("in_channels", 64), configs.get("vae", {})
        if found != (expected := 4 * latent.get("latent_channels", 16)):
            needs = "filling and control models need a picture as well"
            return f"has a transformer with {found} input channels: {needs}; expected {expected} (text to image)"
        return ""

    @property
    def identity(self) -> dict[str, Any]:
        """The model and the settings of its chain and its texts."""
        own = {"true_cfg_scale": self.true_cfg_scale, "max_sequence_length": self.max_sequence_length}
        return super().identity | own

    @property
    def distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input."""
        return bool(self.transformer.config.guidance_embeds)

    def cfg_scale(self, guidance_scale: float) -> float:
        """Returns the weight of classifier-free guidance, which is apart from the network's own guidance."""
        return self.true_cfg_scale

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens after which one of the text encoders cuts off a text."""
        own = tokenizer is self.tokenizers.get("tokenizer_2")
        return self.max_sequence_length if own else int(tokenizer.model_max_length)

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns evenly spaced noise levels and the shift for a picture of this size, which schnell does not use."""
        count, (_, height, width) = self.num_inference_steps, self.latent_shape
        mu = dynamic_shift(config, height * width // 4)
        return {"sigmas": np.linspace(1.0, 1 / count, count), "mu": mu}

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the pooled text embedding."""
        return int(self.transformer.config.pooled_projection_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns each prompt's pooled CLIP embedding, [p, d]."""
        return conditioning[0]["pooled"]

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states` of the T5 encoder, [p, max_sequence_length, d], and `pooled` of the CLIP encoder, [p, d]."""
        states, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"states": states, "pooled": pooled}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer on patches of 2 x 2 latents, whose positions are their rows and columns."""
        n, channels, height, width = x.shape
        rows, columns, states = height // 2, width // 2, texts["states"]
        guidance = torch.full([1], guidance_scale, device=x.device, dtype=torch.float32).expand(n)
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
        patches = x.reshape(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        output = self.transformer(
            hidden_states=patches.reshape(n, rows * columns, 4 * channels),
            timestep=t.expand(n).to(x.dtype) / 1000,
            guidance=guidance if self.distilled else None,
            pooled_projections=texts["pooled"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=places.to(x, non_blocking=True),
            return_dict=False,
        )[0]
        return output.reshape(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        config = self.vae.config
        x0 = x0.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return to_images(self.vae.decode(x0, return_dict=False)[0])
