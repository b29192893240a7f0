"""PixArt-Sigma: a diffusion transformer that reads the text states of T5.

Source: Chen et al., PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation,
2024, arXiv 2403.04692.
"""

from typing import Any, ClassVar

from torch import Tensor

from svdd.assets.hub import quiet
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import Configs
from svdd.diffusion.sizes import TrainedSizes
from svdd.diffusion.texts import masked_mean

__all__ = ["PixArtSigma"]


class PixArtSigma(TrainedSizes, LatentDiffusion):
    """PixArt-Sigma: T5 as the text encoder, epsilon prediction, classifier-free guidance.

    A picture is drawn at that size of the model's training whose aspect ratio is nearest, then scaled and cropped to
    the size that was asked for, as in the pipeline.
    """

    pipeline = "PixArtSigmaPipeline"
    backbone = "transformer"
    tiny = "madebyollin/taesdxl"
    default_steps = 20
    default_guidance = 4.5
    max_tokens = 300
    kernels: ClassVar = {"euler_ancestral": DIFFUSION_KERNELS["euler_ancestral"], **DIFFUSION_KERNELS}
    transformer: Any
    text_encoder: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts this class does not support, or an empty string."""
        network, vae = configs.get("transformer", {}), configs.get("vae", {})
        conditions = network.get("use_additional_conditions")
        if conditions or (conditions is None and network.get("sample_size") == 128):
            return "has a transformer that reads the picture's size, as PixArt-Alpha's; expected one of PixArt-Sigma"
        if (found := network.get("in_channels", 4)) != (latent := vae.get("latent_channels", 4)):
            return f"has a transformer with {found} input channels and latents with {latent}; expected text to image"
        return ""

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the text encoder."""
        return int(self.text_encoder.config.d_model)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return masked_mean(conditioning[0]["states"], conditioning[0]["mask"])

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, the text encoder's output, [p, tokens, d], and `mask`, 0 for padding, int64 [p, tokens].

        The pipeline cleans the texts, if the packages that it needs for that are there; else it makes them lower case.
        """
        with quiet("diffusers"):
            states, mask, *_ = self.pipe.encode_prompt(texts, False, device=self.device, clean_caption=True)
        return {"states": states, "mask": mask}

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer, without its estimate of the variance."""
        output = self.transformer(
            x,
            encoder_hidden_states=texts["states"],
            encoder_attention_mask=texts["mask"],
            timestep=t.expand(len(x)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output.chunk(2, 1)[0] if output.shape[1] == 2 * x.shape[1] else output
