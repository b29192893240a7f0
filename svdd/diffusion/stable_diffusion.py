"""Stable Diffusion 1.x and 2.x, and every model saved in the same pipeline format.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv 2112.10752.
"""

from typing import Any

from torch import Tensor

from svdd.diffusion.latent import Conditioning, LatentDiffusion
from svdd.diffusion.pipelines import to_images

__all__ = ["StableDiffusion"]


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x or 2.x: epsilon, v or sample prediction, with classifier-free guidance."""

    pipeline = "StableDiffusionPipeline"
    tiny = "madebyollin/taesd"
    unet: Any
    vae: Any
    text_encoder: Any

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
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return {"states": encoder(tokens.input_ids, attention_mask=mask)[0]}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """Evaluates the UNet."""
        return self.unet(x, t, encoder_hidden_states=texts["states"], return_dict=False)[0]

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        images = self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return to_images(images)
