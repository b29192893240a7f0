"""Sana: a flow model with linear attention and an autoencoder that compresses 32 times.

Source: Xie et al., SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, 2024,
arXiv 2410.10629.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs
from svdd.diffusion.sizes import TrainedSizes
from svdd.diffusion.texts import masked_mean

__all__ = ["Sana"]


class Sana(TrainedSizes, LatentDiffusion):
    """Sana with classifier-free guidance.

    A picture is drawn in the nearest of the sizes that the model was trained on, then scaled and cropped to the size
    that was asked for, as in the pipeline. Texts are lower-cased, and prompts follow the pipeline's instruction.
    """

    pipeline = "SanaPipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    default_steps, default_guidance = 20, 4.5
    max_tokens = 300  # after the pipeline's instruction
    transformer: Any
    text_encoder: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        network = configs.get("transformer", {})
        if network.get("guidance_embeds"):
            return "has a transformer that takes the guidance scale as an input (Sana-Sprint); expected Sana"
        if (found := network.get("out_channels", 32)) != (expected := network.get("in_channels", 32)):
            return f"has a transformer with {found} output channels; expected {expected}, as many as it reads"
        return ""

    @property
    def dtype(self) -> torch.dtype:
        """Latents are in float32, whatever the precision of the network."""
        return torch.float32

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the text encoder."""
        return int(self.transformer.config.caption_channels)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return masked_mean(**conditioning[0])

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states` of prompts after the instruction, [p, 300, d], and `mask`, true for real tokens."""
        takes = inspect.signature(type(self.pipe).__call__).parameters
        return self._states(texts, takes["complex_human_instruction"].default)

    def encode_negative_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns the same of negative prompts, which have no instruction."""
        return self._states(texts, None)

    def _states(self, texts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        states, mask, *_ = self.pipe.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=instruction,
        )
        return {"states": states, "mask": mask}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer."""
        dtype = self.transformer.dtype
        return self.transformer(
            x.to(dtype),
            encoder_hidden_states=texts["states"].to(dtype),
            encoder_attention_mask=texts["mask"],
            timestep=t.expand(len(x)) * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()
