"""What a model family states and implements: how its pipeline of diffusers turns texts and latents into pictures."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdd.diffusion.base import Diffusion
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.kernels.base import Kernel
from svdd.diffusion.model_index import Configs

__all__ = ["Conditioning", "ModelFamily"]

Conditioning = tuple[dict[str, Tensor], dict[str, Tensor] | None]  # of prompts, of negative prompts


class ModelFamily(Diffusion):
    """All models of one pipeline class of diffusers.

    A family names its pipeline and implements `encode_texts`, `network` and `decode`; what else differs has a default.

    Attributes:
        pipe: The pipeline, whose modules are submodules here under the same names; for its methods and configuration.
    """

    pipeline: ClassVar[str]  # name of the class in diffusers
    backbone: ClassVar[str] = "unet"  # name of the network among the pipeline's parts
    # Kernels by the name of their scheduler; the first is the default.
    kernels: ClassVar[Mapping[str, type[Kernel]]] = DIFFUSION_KERNELS
    tiny: ClassVar[str | None] = None  # hub name of the family's small decoder
    default_steps: ClassVar[int] = 50  # of the pipeline
    default_guidance: ClassVar[float] = 7.5
    max_tokens: ClassVar[int | None] = None  # of a text, where the pipeline reads fewer than its tokenizer states
    patch: ClassVar[int] = 1  # of the autoencoder's latents along a side, where the pipeline joins them in patches
    two_calls: ClassVar[bool] = False  # whether the unconditional half is a call of its own, with texts of other length
    conditional_first: ClassVar[bool] = False  # in the pipeline's batch of both halves; several threads round by place
    pipe: Any
    vae: Any

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts does not suit this class, or an empty string."""
        return ""

    @property
    def size_multiple(self) -> int:
        """Pixels of which height and width are multiples."""
        return self.patch * int(self.pipe.vae_scale_factor)

    def native_size(self) -> tuple[int, int] | None:
        """Returns the height and width in pixels that the network's configuration states, or the pipeline; or None."""
        stated, factor = self.pipe.components[self.backbone].config, self.pipe.vae_scale_factor
        size = stated.sample_size if "sample_size" in stated else self.pipe.default_sample_size
        if size is None:
            return None
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return height * factor, width * factor

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape in which the pipeline draws the noise of one picture of this size in pixels."""
        factor = self.pipe.vae_scale_factor
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def token_limit(self, tokenizer: Any) -> int:
        """Returns the number of tokens, special ones included, after which a text is cut off."""
        return self.max_tokens or int(tokenizer.model_max_length)

    def timestep_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the pipeline gives to its scheduler's `set_timesteps` besides the number of steps.

        `config` is the scheduler's configuration, with the user's settings.
        """
        return {}

    @property
    def distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input, and needs no unconditional half."""
        return False

    def cfg_scale(self, guidance_scale: float) -> float:
        """Returns the weight of classifier-free guidance, where it is not `guidance_scale` itself."""
        return self.guides_above if self.distilled else guidance_scale

    def network_rows(self, guidance_scale: float | None, i: int | None = None) -> int:
        """Returns the network evaluations per denoiser row: 2 if the scale needs the unconditional half."""
        return super().network_rows(None if guidance_scale is None else self.cfg_scale(guidance_scale), i)

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns the network's text inputs (states, pooled embeddings, masks) by name, one row per text in each.

        Their shapes must not depend on the other texts: pad to a fixed length, and trim in `network` with a mask.
        """

    def encode_negative_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns the same of negative prompts, in pipelines that treat them in another way."""
        return self.encode_texts(texts)

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the network and returns what the scheduler's `step` takes, [n, ...] as x.

        Args:
            x: Latents, scaled as the scheduler does, in the shape of `shape`, [n, ...].
            t: The scheduler's timestep, a scalar.
            texts: The inputs of `encode_texts`, one row per latent.
            guidance_scale: Only a distilled network uses it.
        """

    def combine(self, negative: Tensor, positive: Tensor, guidance_scale: float, t: Tensor) -> Tensor:
        """Returns the network's output with guidance: uncond + w (cond - uncond), row by row."""
        return negative + guidance_scale * (positive - negative)

    def evaluate(self, x: Tensor, t: Tensor, conditioning: Conditioning, row: Tensor, guidance_scale: float) -> Tensor:
        """Evaluates the network with guidance; arguments as in `network`, and `row` indexes the encoded prompts."""
        return self.guide(self.halves(x, t, conditioning, row, guidance_scale), guidance_scale, t)

    def halves(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, row: Tensor, guidance_scale: float
    ) -> tuple[Tensor, ...]:
        """Returns the conditional output and, where the scale guides, the unconditional one; arguments as above."""
        positive, negative = conditioning
        texts = {name: part[row] for name, part in positive.items()}
        if negative is None or self.network_rows(guidance_scale) == 1:
            return (self.network(x, t, texts, guidance_scale),)
        others = {name: part[row] for name, part in negative.items()}
        if self.two_calls:
            return self.network(x, t, texts, guidance_scale), self.network(x, t, others, guidance_scale)
        order = -1 if self.conditional_first else 1
        pairs = {name: torch.cat([others[name], part][::order]) for name, part in texts.items()}
        outputs = self.network(torch.cat([x] * 2), t, pairs, guidance_scale).chunk(2)
        return outputs[::-order]

    def guide(self, outputs: tuple[Tensor, ...], guidance_scale: float, t: Tensor) -> Tensor:
        """Returns the output with guidance, from `halves`."""
        conditional, *unconditional = outputs
        if not unconditional:
            return conditional
        return self.combine(unconditional[0], conditional, self.cfg_scale(guidance_scale), t)

    def float32_weights(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields the weights and buffers that stay in float32 when the model is converted to half precision.

        They are those that `from_pretrained(dtype=...)` leaves there: of T5 in float16 the layers that would overflow,
        and computed buffers, such as positions and the frequencies of rotary embeddings.
        """
        for part in (part for part in self.pipe.components.values() if isinstance(part, nn.Module)):
            names = set(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
            if dtype == torch.float16:
                names |= set(getattr(part, "_keep_in_fp32_modules", None) or ())
            yield from (weight for name, weight in part.named_parameters() if names & {*name.split(".")})
            buffers = (layer._buffers[name] for layer in part.modules() for name in layer._non_persistent_buffers_set)
            yield from (buffer for buffer in buffers if buffer is not None)

    def conversion(self, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Returns a conversion to a device and a dtype that leaves `float32_weights` as they are."""
        dtype = convert(torch.empty(0)).dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return convert
        kept = {id(weight) for weight in self.float32_weights(dtype)}
        return lambda weight: weight.to(convert(weight.new_empty(0)).device) if id(weight) in kept else convert(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ModelFamily":
        """Moves and converts the model, as `to` and Lightning do."""
        return super()._apply(self.conversion(fn), recurse)
