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
from svdd.assets.hub import ASSETS, is_local
from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.chunking import Reproducible
from svdd.diffusion.kernels import DIFFUSION_KERNELS
from svdd.diffusion.kernels.base import Kernel, find_kernel
from svdd.diffusion.kernels.transition import Transition
from svdd.diffusion.lora import find_lora, fuse_lora, load_lora
from svdd.diffusion.pipelines import Configs, TinyDecoder, examine, fingerprint, load_pipeline, warn_of_cuts

__all__ = ["Conditioning", "LatentDiffusion"]

Conditioning = tuple[dict[str, Tensor], dict[str, Tensor] | None]  # of prompts, of negative prompts


class LatentDiffusion(Diffusion):
    """A pipeline of diffusers: autoencoder, text encoders and network, as submodules under the pipeline's names.

    A subclass names its pipeline and small decoder, and implements `encode_texts`, `network` and `decode`.

    Args:
        pretrained: `emoji` (ships with svdd), a folder, or a hub name: `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        num_inference_steps: T, the number of denoising steps.
        guidance_scale: Weight of classifier-free guidance; at 1 or less the unconditional half is not computed.
        eta: Noise of the steps, 0 (deterministic) to 1 (as much as DDPM). Guided sampling needs some.
        scheduler: `ddim`, `ddpm`, `euler` or `euler_ancestral`: the solvers whose step is a Gaussian kernel.
        negative_prompt: What to avoid, for prompts without a negative prompt of their own.
        height: Image height in pixels, a multiple of the autoencoder's factor (8); by default the model's own size.
        width: Image width in pixels.
        chunk_size: Latents that go through the network at once, or `auto`: all, halved when memory runs out. Without
            effect in the reproducible mode.
        reproducible: Compute each image apart from others, so that its bits do not depend on the batch, the number of
            devices or threads, or an interruption. `auto`: on a CPU, if the sampler gives an image about 8 rows or
            more per step, where this costs next to nothing.
        compile: Compile network and decoder with torch.compile.
        lora: LoRA weights to fuse into the model: a file, a folder, or a hub name, `owner/name` or `owner/name/file`
            (needs `pip install 'svdd[lora]'`).
        weight_name: The file of the LoRA, if a folder or hub model holds several.
        lora_scale: Factor of the LoRA's updates.
        revision: Branch, tag or commit of a hub model.
        variant: Variant of the weight files, for example `fp16`.
        local_files_only: Use local files and the hub's cache only.

    Raises:
        ValueError: If an argument is out of range, or a model cannot be loaded or is not of this family.
    """

    pipeline: ClassVar[str]  # name of the class in diffusers
    kernels: ClassVar[Mapping[str, type[Kernel]]] = DIFFUSION_KERNELS  # by the name of their scheduler
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
        weight_name: str | None = None,
        lora_scale: float = 1.0,
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
        if not math.isfinite(lora_scale):
            raise ValueError(f"lora_scale must be a finite number, got {lora_scale}")
        if not isinstance(negative_prompt, str):
            raise ValueError(f"negative_prompt must be text, got {negative_prompt!r}")
        kernel = find_kernel(scheduler, self.kernels)
        self.pretrained, self.lora, self.lora_scale, self.scheduler = pretrained, lora, lora_scale, scheduler
        self.guidance_scale, self.eta, self.negative_prompt = guidance_scale, eta, negative_prompt
        self.local_files_only = local_files_only
        source = str(ASSETS / "emoji-sd") if pretrained == "emoji" else pretrained
        pipeline = load_pipeline(self.pipeline, source, self.misfit, variant, revision, local_files_only)
        if lora is not None:
            load_lora(pipeline, lora, weight_name, local_files_only)
        parts = pipeline.components
        encoders = (name for name, part in parts.items() if name.startswith("text_encoder") and part is not None)
        names = [self.backbone, "vae", *sorted(encoders)]
        self.weights = fingerprint(*(parts[name] for name in names))  # before fusing, whose rounding may vary
        self._unfused = {name: digest(parts[name]) for name in names} if lora is not None else {}
        if lora is not None:
            fuse_lora(pipeline, lora, lora_scale)
        # Parameters keep requires_grad=True, as diffusers loads them: on the CPU, PyTorch picks other convolution
        # kernels for frozen weights, and the last bit of every image would differ from the pipeline's.
        for name in names:
            self.add_module(name, parts[name].eval())
        self.tokenizers = {name: part for name, part in parts.items() if name.startswith("tokenizer")}
        config = kernel.settings(pipeline.scheduler.config)
        self.kernel = kernel(config, num_inference_steps, Transition(eta=eta))
        factor, native = pipeline.vae_scale_factor, parts[self.backbone].config.sample_size
        if native is None and None in (height, width):
            raise UserError(f"pretrained={pretrained!r} states no image size; give height and width")
        size = list(native) if isinstance(native, list | tuple) else [native, native]
        for axis, (name, pixels) in enumerate({"height": height, "width": width}.items()):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name} must be a positive multiple of {factor}, got {pixels}")
            size[axis] = size[axis] if pixels is None else pixels // factor
        self.latent_shape = (pipeline.vae.config.latent_channels, *size)
        if compile:
            parts[self.backbone].compile()
            pipeline.vae.decoder.compile()

    @classmethod
    def examine(cls, arguments: Mapping[str, Any]) -> None:
        """Raises UserError if the model is of another kind, or a local LoRA does not exist."""
        pretrained, lora, local = (arguments.get(name) for name in ("pretrained", "lora", "local_files_only"))
        if pretrained not in (None, "emoji"):
            examine(cls.pipeline, pretrained, cls.misfit, arguments.get("revision"), bool(local))
        if lora is not None and is_local(lora):
            find_lora(lora, arguments.get("weight_name"), bool(local))

    @classmethod
    def misfit(cls, configs: Configs) -> str:
        """Returns what in the config.json of the parts does not suit this class, or an empty string."""
        return ""

    @property
    def distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input, and needs no unconditional half."""
        return False

    def network_rows(self, guidance_scale: float | None) -> int:
        """Returns the network evaluations per denoiser row: 2 if the scale needs the unconditional half."""
        return 1 if self.distilled else super().network_rows(guidance_scale)

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Returns the network's text inputs (states, pooled embeddings, ...) by name, one row per text in each."""

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, texts: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """Evaluates the network on scaled latents [n, c, h, w] at timestep t, a scalar, with one row of texts each.

        Only a distilled network uses the guidance scale.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """The model, by name without path and by weights, and the settings of its chain."""
        lora = None if self.lora is None else Path(self.lora).name
        lora = lora if lora is None or self.lora_scale == 1 else f"{lora} times {self.lora_scale}"
        names = {"pretrained": Path(self.pretrained).name, "lora": lora}
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
        guided = self.network_rows(self.guidance_scale) > 1
        return self._encode(list(prompts)), self._encode(negatives) if guided else None

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the scheduler's first level."""
        return self.kernel.initial(noise)

    def denoise(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor) -> Denoised:
        """Evaluates the network with guidance, uncond + w (cond - uncond), and returns x0 and the kernel's mean."""
        return self.kernel.predict(x, self._guided(x, i, conditioning, row, self.guidance_scale), i)

    def preview(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor, guidance_scale: float) -> Tensor:
        """Returns x0 at another guidance scale; at 1 or less the unconditional half is not computed."""
        if self.network_rows(guidance_scale) > self.network_rows(self.guidance_scale):
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
        return TinyDecoder(tiny if name == "tiny" else name, self.latent_shape[0], self.dtype, self.local_files_only)

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        for tokenizer in self.tokenizers.values():
            warn_of_cuts(tokenizer, texts)
        return self.chunker.map(self.encode_texts, len(texts), texts)

    def _guided(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor, guidance_scale: float) -> Tensor:
        positive, negative = conditioning
        x, t = self.kernel.scale_input(x, i), self.kernel.timesteps[i].to(x.device)
        if negative is None or self.network_rows(guidance_scale) == 1:
            return self.network(x, t, {name: part[row] for name, part in positive.items()}, guidance_scale)
        pairs = {name: torch.cat([negative[name][row], part[row]]) for name, part in positive.items()}
        unconditional, conditional = self.network(torch.cat([x] * 2), t, pairs, guidance_scale).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)
