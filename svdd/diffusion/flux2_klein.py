"""FLUX.2 klein: small models, step-wise distilled or base.

Source: Black Forest Labs, FLUX.2 klein, 2026, github.com/black-forest-labs/flux2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdd import require_at_least
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs, to_images
from svdd.diffusion.texts import masked_mean

__all__ = ["Flux2Klein"]

_LAYERS = (9, 18, 27)  # of the text encoder, whose states are joined


class Flux2Klein(LatentDiffusion):
    """FLUX.2 klein; the base models have classifier-free guidance in two calls, the distilled ones have none.

    Args:
        max_sequence_length: Tokens that the text encoder reads: T5 in SD 3 (256) and FLUX.1 (512), Qwen3 in FLUX.2
            klein (512, with those of the chat's turns).
    """

    pipeline = "Flux2KleinPipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    default_steps, default_guidance = 50, 4.0
    two_calls, patch = True, 2
    transformer: Any
    text_encoder: Any

    def __init__(self, *args: Any, max_sequence_length: int = 512, **kwargs: Any) -> None:
        require_at_least(1, max_sequence_length=max_sequence_length)
        self.max_sequence_length = max_sequence_length
        super().__init__(*args, **kwargs)

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        network, vae, text = (configs.get(name, {}) for name in ("transformer", "vae", "text_encoder"))
        found, expected = network.get("in_channels", 128), 4 * vae.get("latent_channels", 32)
        if found != expected:
            return f"has a transformer with {found} input channels; expected {expected}, 4 for each of its latents"
        if (found := text.get("num_hidden_layers", _LAYERS[-1])) < _LAYERS[-1]:
            return f"has a text encoder with {found} layers; expected at least {_LAYERS[-1]}, whose states are read"
        return ""

    @property
    def identity(self) -> dict[str, Any]:
        """The model and the settings of its chain and its texts."""
        return super().identity | {"max_sequence_length": self.max_sequence_length}

    @property
    def distilled(self) -> bool:
        """Whether the model was distilled, and ignores the guidance scale."""
        return bool(self.pipe.config.is_distilled)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of a latent, with four times the autoencoder's channels and half its height and width."""
        return (self.transformer.config.in_channels, height // self.size_multiple, width // self.size_multiple)

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens after which a text is cut off, without those of the chat's turns."""
        return self.max_sequence_length - int(self._tokenize([""]).attention_mask.sum())

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns evenly spaced noise levels and their shift, which depends on the size and on the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        count, (_, height, width) = self.num_inference_steps, self.latent_shape
        return {"sigmas": np.linspace(1.0, 1 / count, count), "mu": compute_empirical_mu(height * width, count)}

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the joined states of the text encoder."""
        return int(self.transformer.config.joint_attention_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return masked_mean(**conditioning[0])

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states` of three layers, joined, [p, max_sequence_length, d], and `mask`, true for real tokens."""
        tokens = self._tokenize(texts).to(self.device)
        output = self.text_encoder(**tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = torch.cat([output.hidden_states[layer] for layer in _LAYERS], dim=-1)
        return {"states": states, "mask": tokens.attention_mask.bool()}

    def _tokenize(self, texts: list[str]) -> Any:
        """Returns the tokens of each text in the turns of a chat, padded, with their mask."""
        tokenizer: Any = self.tokenizers["tokenizer"]
        turns = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for text in texts
        ]
        return tokenizer(
            turns, return_tensors="pt", padding="max_length", truncation=True, max_length=self.max_sequence_length
        )

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer, for which a position has four coordinates: time, row, column and word."""
        n, _, height, width = x.shape
        one, words = torch.arange(1), torch.arange(texts["states"].shape[1])
        places = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
        output = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.transformer.dtype),
            timestep=t.expand(n).to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=texts["states"],
            txt_ids=torch.cartesian_prod(one, one, one, words).to(x.device, non_blocking=True).expand(n, -1, -1),
            img_ids=places.to(x.device, non_blocking=True).expand(n, -1, -1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(x.shape)

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder on patches scaled by its batch norm."""
        statistics, epsilon = self.vae.bn, self.vae.config.batch_norm_eps
        mean = statistics.running_mean.view(1, -1, 1, 1).to(x0)
        deviation = torch.sqrt(statistics.running_var.view(1, -1, 1, 1) + epsilon).to(x0)
        patches = x0 * deviation + mean
        n, channels, height, width = patches.shape
        x0 = patches.reshape(n, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        x0 = x0.reshape(n, channels // 4, 2 * height, 2 * width).to(self.vae.dtype)
        return to_images(self.vae.decode(x0, return_dict=False)[0])
