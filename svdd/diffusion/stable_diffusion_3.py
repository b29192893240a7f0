"""Stable Diffusion 3 and 3.5.

Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv 2403.03206.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from svdd import UserError, is_integer
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs, to_images
from svdd.diffusion.texts import dynamic_shift

__all__ = ["StableDiffusion3"]


class StableDiffusion3(LatentDiffusion):
    """Stable Diffusion 3 or 3.5, with classifier-free guidance; the T5 text encoder may be absent.

    Args:
        max_sequence_length: Tokens that the T5 text encoder reads, or rows of zeros in place of an absent T5, at most
            512; by default as many as the pipeline takes, 256, and none if the transformer reads states as wide as
            those of both CLIP encoders, which leave T5 no room.
    """

    pipeline = "StableDiffusion3Pipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    tiny = "madebyollin/taesd3"
    default_steps, default_guidance = 28, 7.0
    transformer: Any
    text_encoder: Any
    text_encoder_2: Any

    def __init__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> None:
        length = 256 if max_sequence_length is None else max_sequence_length
        if not is_integer(length) or not 0 <= length <= 512:
            raise ValueError(f"max_sequence_length must be an integer in 0 .. 512, got {length!r}")
        self.max_sequence_length = length
        super().__init__(*args, **kwargs)
        if self.pipe.text_encoder_3 is not None:
            if self.max_sequence_length == 0:
                raise ValueError("max_sequence_length must be 1 or more for a model with a T5 text encoder, got 0")
        elif max_sequence_length is None:
            clip = self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size
            self.max_sequence_length = 256 if self.transformer.config.joint_attention_dim > clip else 0

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        found = configs.get("transformer", {}).get("in_channels", 16)
        if found != (latent := configs.get("vae", {}).get("latent_channels", 16)):
            return f"has a transformer with {found} input channels and latents with {latent}; expected as many"
        return ""

    @property
    def identity(self) -> dict[str, Any]:
        """The model and the settings of its chain and its texts."""
        return super().identity | {"max_sequence_length": self.max_sequence_length}

    @property
    def size_multiple(self) -> int:
        """Pixels of a patch of latents."""
        return int(self.pipe.vae_scale_factor * self.transformer.config.patch_size)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of a latent; UserError if the network has no positions for so large a picture."""
        if max(height, width) > (most := self.transformer.config.pos_embed_max_size * self.size_multiple):
            raise UserError(f"height and width must be at most {most} for this model, got {height} and {width}")
        return super().shape(height, width)

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens after which one of the text encoders cuts off a text."""
        own = tokenizer is self.tokenizers.get("tokenizer_3")
        return self.max_sequence_length if own else int(tokenizer.model_max_length)

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a shift if the scheduler's depends on the size of the picture; the published ones do not."""
        _, height, width = self.latent_shape
        if not config.get("use_dynamic_shifting"):
            return {}
        return {"mu": dynamic_shift(config, height * width // self.transformer.config.patch_size**2)}

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the pooled text embeddings."""
        return int(self.transformer.config.pooled_projection_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns each prompt's pooled embeddings of both CLIP encoders, [p, d]."""
        return conditioning[0]["pooled"]

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, [p, 77 + max_sequence_length, d], zeros in place of an absent T5, and `pooled`, [p, d]."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(texts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"states": states, "pooled": pooled}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer."""
        return self.transformer(
            hidden_states=x,
            timestep=t.expand(len(x)),
            encoder_hidden_states=texts["states"],
            pooled_projections=texts["pooled"],
            return_dict=False,
        )[0]

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        config = self.vae.config
        x0 = x0.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return to_images(self.vae.decode(x0, return_dict=False)[0])
