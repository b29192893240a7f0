"""Z-Image and Z-Image-Turbo: flow models whose text encoder is Qwen3.

Source: Z-Image Team, Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer,
2025, arXiv 2511.22699.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svdd import require_numbers
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels import FLOW_KERNELS
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.pipelines import to_images
from svdd.diffusion.texts import dynamic_shift, masked_mean, pad_states

__all__ = ["ZImage"]

_NATIVE = 1024  # pixels


class ZImage(LatentDiffusion):
    """Z-Image: classifier-free guidance is cond + w (cond - uncond), and on at w > 0; Turbo takes w = 0.

    Args:
        args: As in `LatentDiffusion`.
        cfg_normalization: Longest norm of a guided output, in units of its conditional output's; 0 for any.
        cfg_truncation: Progress 1 - s of the noise level s, 0 .. 1, after which the steps have no guidance.
        kwargs: As in `LatentDiffusion`.
    """

    pipeline = "ZImagePipeline"
    backbone = "transformer"
    kernels = FLOW_KERNELS
    tiny = "madebyollin/taef1"
    default_steps, default_guidance = 50, 5.0
    guides_above = 0.0
    max_tokens = 512  # in the turns of a chat
    conditional_first, patch = True, 2
    transformer: Any
    text_encoder: Any

    def __init__(self, *args: Any, cfg_normalization: float = 0.0, cfg_truncation: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, number in {"cfg_normalization": cfg_normalization, "cfg_truncation": cfg_truncation}.items():
            require_numbers(**{name: number})
            if not number >= 0:
                raise ValueError(f"{name} must be >= 0, got {number}")
        if cfg_truncation < 1 and self.inner_steps > 1:  # whose noise levels lie beyond their step's
            raise ValueError("cfg_truncation cannot be combined with inner_steps; expected cfg_truncation=1")
        self.cfg_normalization, self.cfg_truncation = cfg_normalization, cfg_truncation

    @property
    def dtype(self) -> torch.dtype:
        """Latents are in float32, whatever the precision of the network."""
        return torch.float32

    @property
    def identity(self) -> dict[str, Any]:
        """The model, and the settings of its chain."""
        return super().identity | {name: getattr(self, name) for name in ("cfg_normalization", "cfg_truncation")}

    def native_size(self) -> tuple[int, int]:
        """Returns the pipeline's own height and width in pixels."""
        return _NATIVE, _NATIVE

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens that fit behind the beginning of the user's turn."""
        turn = [{"role": "user", "content": "{}"}]
        before = tokenizer.apply_chat_template(turn, tokenize=False, enable_thinking=True).partition("{}")[0]
        return self.max_tokens - len(tokenizer(before).input_ids)

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns evenly spaced noise levels and a shift for schedulers whose shift depends on the picture's size."""
        count, (_, height, width) = self.num_inference_steps, self.latent_shape
        mu = dynamic_shift(config, (height // 2) * (width // 2))
        return {"sigmas": torch.linspace(1.0, 1 / count, count).tolist(), "mu": mu}

    @property
    def prompt_features_size(self) -> int:  # type: ignore[override]
        """Width of the text encoder."""
        return int(self.transformer.config.cap_feat_dim)

    def prompt_features(self, conditioning: Conditioning) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return masked_mean(**conditioning[0])

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns `states`, the text encoder's last but one, [p, 512, d], and `mask`, true for real tokens."""
        found, _ = self.pipe.encode_prompt(list(texts), self.device, False, max_sequence_length=self.max_tokens)
        real = [states.new_ones(len(states)) for states in found]
        return pad_states(pad_sequence(found, batch_first=True), pad_sequence(real, batch_first=True), self.max_tokens)

    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the transformer, which is told 1 - s and predicts x0 - noise."""
        lengths = texts["mask"].sum(1).tolist()
        captions = [states[:count] for states, count in zip(texts["states"], lengths, strict=True)]
        frames = list(x.to(self.transformer.dtype).unsqueeze(2).unbind(0))
        rows = self.transformer(frames, (1000 - t.expand(len(x))) / 1000, captions, return_dict=False)[0]
        return -torch.stack([row.float() for row in rows]).squeeze(2)

    def network_rows(self, guidance_scale: float | None, i: int | None = None) -> int:
        """Returns 2 for steps with guidance, else 1."""
        return (
            1 if i is not None and self._truncated(self.kernel.timesteps[i]) else super().network_rows(guidance_scale)
        )

    def halves(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, row: Tensor, guidance_scale: float
    ) -> tuple[Tensor, ...]:
        """Evaluates the network, its unconditional half up to the step at which guidance is truncated."""
        conditioning = (conditioning[0], None) if self._truncated(t) else conditioning
        return super().halves(x, t, conditioning, row, guidance_scale)

    def _truncated(self, t: Tensor) -> bool:
        return self.cfg_truncation < 1 and float((1000 - t.float()) / 1000) > self.cfg_truncation

    def combine(self, negative: Tensor, positive: Tensor, guidance_scale: float, t: Tensor) -> Tensor:
        """Returns cond + w (cond - uncond), each row scaled down to the longest norm."""
        guided = positive + guidance_scale * (positive - negative)
        if not self.cfg_normalization:
            return guided
        most, own = (
            torch.stack([torch.linalg.vector_norm(row) for row in rows])[:, None, None, None]
            for rows in (positive, guided)
        )
        most = most * self.cfg_normalization
        return torch.where(own > most, guided * (most / own), guided)

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder."""
        config = self.vae.config
        x0 = x0.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return to_images(self.vae.decode(x0, return_dict=False)[0])
