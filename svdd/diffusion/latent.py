"""What all latent diffusion models saved by diffusers have in common."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.content import digest
from svdd.assets.hub import ASSETS
from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.chunking import Reproducible
from svdd.diffusion.kernels import KERNELS, Kernel, chain_settings, find_kernel
from svdd.diffusion.pipelines import TinyDecoder, fingerprint, load_pipeline, warn_of_cuts

__all__ = ["Conditioning", "LatentDiffusion"]

Conditioning = tuple[dict[str, Tensor], dict[str, Tensor] | None]  # of prompts, of negative prompts


class LatentDiffusion(Diffusion):
    """A pipeline of diffusers: autoencoder, text encoders and network, as submodules under the pipeline's names.

    A subclass names its pipeline and small decoder, and implements `encode_texts`, `network` and `decode`.

    Args:
        pretrained: `emoji` (ships with svdd), a folder, or a hub name: `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        num_inference_steps: T, the number of denoising steps.
        guidance_scale: Weight of classifier-free guidance; at 1 or less the unconditional half is not computed.
        eta: Noise of the DDIM steps, 0 (deterministic) to 1 (as much as DDPM). Guided sampling needs some.
        scheduler: `ddim`, `ddpm` or `euler_ancestral`: the solvers whose step is a Gaussian kernel.
        negative_prompt: What to avoid, for prompts without a negative prompt of their own.
        height: Image height in pixels, a multiple of the autoencoder's factor (8); by default the model's own size.
        width: Image width in pixels.
        chunk_size: Latents that go through the network at once, or `auto`: all, halved when memory runs out. Without
            effect in the reproducible mode.
        reproducible: Compute each image apart from others, so that its bits do not depend on the batch, the number of
            devices or threads, or an interruption. `auto`: on a CPU, if the sampler gives an image about 8 rows or
            more per step, where this costs nothing.
        compile: Compile network and decoder with torch.compile.
        lora: Folder, file or hub name of LoRA weights to fuse into the model (needs `pip install 'svdd[lora]'`).
        revision: Branch, tag or commit of a hub model.
        variant: Variant of the weight files, for example `fp16`.
        local_files_only: Use local files and the hub's cache only.

    Raises:
        ValueError: If an argument is out of range, or a model cannot be loaded or is not of this family.
    """

    pipeline: ClassVar[str]  # name of the class in diffusers
    kernels: ClassVar[Mapping[str, type[Kernel]]] = KERNELS  # by the name of their scheduler
    backbone: ClassVar[str] = "unet"  # name of the network among the pipeline's parts
    from_files = ("scheduler_config",)
    tiny: ClassVar[str]  # hub name of the family's small decoder
    guidance_scale: float

    def __init__(
        self,
        pretrained: str = "emoji",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 1.0,
        scheduler: str = "ddim",
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        chunk_size: int | str = "auto",
        reproducible: Reproducible = "auto",
        compile: bool = False,
        lora: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(num_inference_steps, chunk_size, reproducible)
        self.chunker.concurrent = not compile
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        kernel = find_kernel(scheduler, self.kernels)
        self.pretrained, self.lora, self.scheduler = pretrained, lora, scheduler
        self.guidance_scale, self.eta, self.negative_prompt = guidance_scale, eta, negative_prompt
        source = str(ASSETS / "emoji-sd") if pretrained == "emoji" else pretrained
        local = {"local_files_only": local_files_only or pretrained == "emoji"}
        pipeline = load_pipeline(self.pipeline, source, lora, revision=revision, variant=variant, **local)
        parts = pipeline.components
        encoders = (name for name, part in parts.items() if name.startswith("text_encoder") and part is not None)
        names = [self.backbone, "vae", *sorted(encoders)]
        self.weights = fingerprint(*(parts[name] for name in names))  # before fusing, whose rounding may vary
        self._unfused = {name: digest(parts[name]) for name in names} if lora is not None else {}
        if lora is not None:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        # Parameters keep requires_grad=True, as diffusers loads them: on the CPU, PyTorch picks other convolution
        # kernels for frozen weights, and the last bit of every image would differ from the pipeline's.
        for name in names:
            self.add_module(name, parts[name].eval())
        self.tokenizers = {name: part for name, part in parts.items() if name.startswith("tokenizer")}
        self.kernel = kernel(chain_settings(pipeline.scheduler.config), num_inference_steps, eta)
        factor, native = pipeline.vae_scale_factor, parts[self.backbone].config.sample_size
        size = list(native) if isinstance(native, list | tuple) else [native, native]
        for axis, (name, pixels) in enumerate({"height": height, "width": width}.items()):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name} must be a positive multiple of {factor}, got {pixels}")
            size[axis] = size[axis] if pixels is None else pixels // factor
        if None in size:
            raise UserError(f"pretrained={pretrained!r} states no image size: set height and width")
        self.latent_shape = (pipeline.vae.config.latent_channels, *size)
        if compile:
            parts[self.backbone].compile()
            pipeline.vae.decoder.compile()

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns the network's text inputs (states, pooled embeddings, ...) by name, one row per text in each."""

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """Evaluates the network on scaled latents [n, c, h, w] at timestep t, a scalar, with one row of texts each."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model, by name without path and by weights, and the settings of its chain."""
        names = {"pretrained": Path(self.pretrained).name, "lora": None if self.lora is None else Path(self.lora).name}
        settings = ("weights", "scheduler", "guidance_scale", "negative_prompt", "eta")
        return super().identity | names | {name: getattr(self, name) for name in settings}

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The configuration of the scheduler."""
        return self.kernel.config

    def fingerprints(self) -> dict[str, str]:
        """Returns digests of the scheduler and the tokenizers and of each network, before a LoRA was fused."""
        return super().fingerprints() | self._unfused

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Conditioning:
        """Returns the encoded prompts and negative prompts (None without guidance)."""
        negatives = [self.negative_prompt if text is None else text for text in negative_prompts]
        return self._encode(list(prompts)), self._encode(negatives) if self.guidance_scale > 1 else None

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the scheduler's first level."""
        return self.kernel.initial(noise)

    def denoise(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor) -> Denoised:
        """Evaluates the network with guidance, uncond + w (cond - uncond), and returns x0 and the kernel's mean."""
        return self.kernel.predict(x, self._guided(x, i, conditioning, row, self.guidance_scale), i)

    def preview(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor, guidance_scale: float) -> Tensor:
        """Returns x0 at another guidance scale; at 1 or less the unconditional half is not computed."""
        if guidance_scale > 1 >= self.guidance_scale:
            own = f"a model with guidance; its own scale is {self.guidance_scale}"
            raise UserError(f"a preview at guidance_scale={guidance_scale} needs {own}")
        return self.kernel.predict(x, self._guided(x, i, conditioning, row, guidance_scale), i).x0

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """One DDIM step with eta = 0, in the scheduler's coordinates."""
        return self.kernel.flow(x, x0, i)

    def std(self, i: int) -> float:
        """Returns the scheduler's noise at step i."""
        return self.kernel.std(i)

    def load_decoder(self, name: str) -> nn.Module:
        """Loads an AutoencoderTiny; `tiny` is the one for this model."""
        tiny = str(ASSETS / "emoji-tiny") if self.pretrained == "emoji" else self.tiny
        return TinyDecoder(tiny if name == "tiny" else name, self.latent_shape[0], self.dtype)

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        for tokenizer in self.tokenizers.values():
            warn_of_cuts(tokenizer, texts)
        return self.chunker.map(self.encode_texts, len(texts), texts)

    def _guided(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor, guidance_scale: float) -> Tensor:
        positive, negative = conditioning
        x, t = self.kernel.scale_input(x, i), self.kernel.timesteps[i].to(x.device)
        if negative is None or guidance_scale <= 1:
            return self.network(x, t, {name: part[row] for name, part in positive.items()})
        pairs = {name: torch.cat([negative[name][row], part[row]]) for name, part in positive.items()}
        unconditional, conditional = self.network(torch.cat([x] * 2), t, pairs).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)
