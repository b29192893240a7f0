"""What all latent diffusion models saved by diffusers have in common."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from svdd import UserError, is_integer, require_numbers
from svdd.assets.hub import ASSETS, is_local, quiet
from svdd.assets.loaded import borrow
from svdd.diffusion.arithmetic import without_autocast
from svdd.diffusion.attention import check_backend, runs_in_threads, set_backend
from svdd.diffusion.base import Denoised
from svdd.diffusion.chunking import Reproducible
from svdd.diffusion.compiled import compile_calls, compile_network
from svdd.diffusion.family import Conditioning
from svdd.diffusion.kernels.base import find_kernel
from svdd.diffusion.kernels.glass import glass
from svdd.diffusion.kernels.transition import Noise, Transition
from svdd.diffusion.lora import find_lora, fuse_lora, load_lora
from svdd.diffusion.model_index import EMBEDDED, Source, examine, name_of, read_json
from svdd.diffusion.offload import OffloadMode
from svdd.diffusion.parts import PipelineParts
from svdd.diffusion.pipelines import (
    DTYPES,
    Dtype,
    TinyDecoder,
    load_pipeline,
    warn_of_cuts,
)

__all__ = ["LatentDiffusion"]


class LatentDiffusion(PipelineParts):
    """A pipeline of diffusers: autoencoder, text encoders and network, as submodules under the pipeline's names.

    A model family is a subclass in one file: see `ModelFamily` for what it states and implements.

    Args:
        pretrained: `emoji` (ships with svdd), a folder, a hub name: `stable-diffusion-v1-5/stable-diffusion-v1-5`, or a
            `.safetensors` file with a whole pipeline or its network alone.
        num_inference_steps: T, the number of denoising steps; by default as many as the pipeline takes.
        guidance_scale: Weight of classifier-free guidance, by default the pipeline's; where it does not guide (mostly
            at 1 or less), the unconditional half is not computed.
        eta: Noise of the steps, 0 (deterministic) to 1 (as much as DDPM). Guided sampling needs some.
        scheduler: A solver whose step is a Gaussian kernel, such as `ddim`, `ddpm` or `euler_ancestral`; by default
            the family's first.
        scheduler_options: Settings of the scheduler in place of the saved ones: `{timestep_spacing: trailing}`.
        noise: Rule for the noise of a step: `posterior` (eta times that of DDPM's posterior), `cps` (the old noise
            keeps the share cos(eta pi / 2)), or `fresh` (none of the old noise is kept).
        rho: Correlation of the noise before and after a step, 0 to 1, in place of a rule and eta.
        inner_steps: Network evaluations of a step. Above 1 a step is a GLASS transition: a draw from its
            exact law rather than from a Gaussian around the prediction.
        negative_prompt: What to avoid, for prompts without a negative prompt of their own.
        height: Image height in pixels, a multiple of the model's factor (mostly 8 or 16); by default the model's own.
        width: Image width in pixels.
        chunk_size: Latents that go through the network at once, or `auto`: as many as fit into memory. Without
            effect in the reproducible mode.
        reproducible: Compute each image apart from others, so that its bits do not depend on the batch, the number of
            devices or threads, or an interruption. `auto`: on a CPU, if the sampler gives an image about 8 rows or
            more per step, where this costs next to nothing.
        compile: Compile network and decoders with torch.compile. The first calls take minutes, later ones less time.
        attention_backend: How the network computes attention, by the names of diffusers: `native`, `_native_cudnn`,
            `flash`, `sage`, `xformers`, ...; UNets, SD 3, Sana and PixArt-Sigma only have PyTorch's own.
        lora: LoRA weights to fuse into the model: a file, a folder, or a hub name, `owner/name` or `owner/name/file`
            (needs `pip install 'svdd[lora]'`).
        weight_name: The file of the LoRA, if a folder or hub model holds several.
        lora_scale: Factor of the LoRA's updates.
        revision: Branch, tag or commit of a hub model.
        variant: Variant of the weight files, for example `fp16`.
        config: A folder or hub name of the pipeline that a single file belongs to; by default the hub's. It also
            provides what the file lacks, such as the text encoders.
        dtype: Precision in which the weights are read; `auto`: that of `--trainer.precision`, in Python float32.
        offload: Parts that are on the device only while they compute: `text_encoders`, which leave it once the prompts
            are encoded, or `model`: one part at a time. It saves memory, not time.
        vae_slicing: Decode one image at a time.
        vae_tiling: Decode images above the autoencoder's own size in tiles, which can leave faint seams.
        parity: Compute every number bit for bit as the pipeline does. Otherwise the weights of convolutions are kept in
            the order in memory that is fastest for the device and the precision, and last bits differ.
        local_files_only: Use local files and the hub's cache only.

    Raises:
        ValueError: If an argument is out of range, or a model cannot be loaded or is not of this family.
    """

    from_files = ("scheduler_config",)
    guidance_scale: float

    def __init__(
        self,
        pretrained: str = "emoji",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float = 1.0,
        scheduler: str | None = None,
        scheduler_options: dict[str, Any] | None = None,
        noise: Noise = "posterior",
        rho: float | None = None,
        inner_steps: int = 1,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        chunk_size: int | str = "auto",
        reproducible: Reproducible = "auto",
        compile: bool = False,
        attention_backend: str | None = None,
        lora: str | None = None,
        weight_name: str | None = None,
        lora_scale: float = 1.0,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        dtype: Dtype = "auto",
        offload: OffloadMode = "none",
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        parity: bool = False,
        local_files_only: bool = False,
    ) -> None:
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        super().__init__(steps, chunk_size, reproducible)
        self.chunker.concurrent = runs_in_threads(attention_backend)
        self.scheduler = next(iter(self.kernels)) if scheduler is None else scheduler
        self.guidance_scale = self.default_guidance if guidance_scale is None else guidance_scale
        self.transition, self.inner_steps = Transition(noise, eta, rho, inner_steps), inner_steps
        for name, number in {"guidance_scale": self.guidance_scale, "lora_scale": lora_scale}.items():
            require_numbers(**{name: number})
            if not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}")
        if not isinstance(negative_prompt, str):
            raise ValueError(f"negative_prompt must be text, got {negative_prompt!r}")
        if compile and offload != "none":
            raise ValueError(f"offload={offload!r} cannot be combined with compile")
        check_backend(attention_backend)
        self.compiled, self.attention_backend = compile, attention_backend
        kernel, self.scheduler_options = find_kernel(self.scheduler, self.kernels), dict(scheduler_options or {})
        kernel.check_options(self.scheduler_options)
        self.lora, self.lora_scale, self.offload = lora, lora_scale, offload
        self.eta, self.negative_prompt, self.local_files_only = eta, negative_prompt, local_files_only
        self.parity = parity
        if isinstance(pretrained, str):
            self.pretrained = pretrained
            source = Source(pretrained, config, revision, variant, local_files_only)
            options = (
                dtype,
                attention_backend,
                lora,
                weight_name,
                lora_scale,
                vae_slicing,
                vae_tiling,
                parity,
            )
            key = None if compile or offload != "none" else (type(self), source, *options)
        elif self.pipeline not in (base.__name__ for base in type(pretrained).__mro__):
            kind = type(pretrained).__name__
            raise UserError(f"{type(self).__name__} takes a {self.pipeline}, got a {kind}; use from_pipeline")
        else:
            if compile or attention_backend is not None:
                raise UserError("compile and attention_backend change a pipeline object: set them on the pipeline")
            self.pretrained, self.borrowed, key = name_of(pretrained), True, None

        def load() -> LatentDiffusion:
            """Reads the weights into this object."""
            if self.borrowed:
                self.pipe = pretrained
            else:
                self.pipe = load_pipeline(source, self.pipeline, self.misfit, DTYPES[dtype])
                self.anchor = self.anchor.to(DTYPES[dtype])
            if lora is not None:
                load_lora(self.pipe, lora, weight_name, local_files_only)
            self.take_parts(f"pretrained={self.pretrained!r}", lora is not None)
            if lora is not None:
                fuse_lora(self.pipe, lora, lora_scale)
            if attention_backend is not None:
                set_backend(getattr(self, self.backbone), attention_backend)
            self.save_memory(offload, vae_slicing, vae_tiling)
            self.arrange()
            return self

        if (loaded := borrow("diffusion", key, load, alone=True)) is not self:
            self.share_parts(loaded)
        self.latent_shape = self._latent_shape(height, width)
        settings = kernel.configure(self.pipe.scheduler.config, self.scheduler_options)
        self.kernel = kernel(settings, steps, self.transition, self.timestep_options(settings))
        if compile:
            compile_network(getattr(self, self.backbone), reproducible is True)
            compile_calls([self.vae.decoder], reproducible is True)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        multiple, native = self.size_multiple, self.native_size()
        if native is None and None in (height, width):
            raise UserError(f"pretrained={self.pretrained!r} states no image size; give height and width")
        for name, pixels in {"height": height, "width": width}.items():
            if pixels is not None and (not is_integer(pixels) or pixels < multiple or pixels % multiple):
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {pixels!r}")
        default_height, default_width = native or (multiple, multiple)
        return self.shape(height or default_height, width or default_width)

    @classmethod
    def examine(cls, arguments: Mapping[str, Any]) -> None:
        """Raises ValueError if the model or the scheduler is of another kind, or a local LoRA does not exist."""
        check_backend(arguments.get("attention_backend"))
        index = examine(source := Source.of(arguments), cls.pipeline, cls.misfit)
        if (lora := arguments.get("lora")) is not None and is_local(lora):
            find_lora(lora, arguments.get("weight_name"), source.local_files_only)
        kernel = find_kernel(arguments.get("scheduler") or next(iter(cls.kernels)), cls.kernels)
        kernel.check_options(options := arguments.get("scheduler_options") or {})
        if (file := Path(index.source).expanduser() / "scheduler" / "scheduler_config.json").is_file():
            kernel.configure(read_json(source.what, file), options)

    @property
    def identity(self) -> dict[str, Any]:
        """The model, by name without path and by weights, and the settings of its chain."""
        lora: Any = self.adapters() or None if self.lora is None else Path(self.lora).name
        lora = lora if self.lora is None or self.lora_scale == 1 else f"{lora} times {self.lora_scale}"
        names = {"pretrained": Path(self.pretrained).name, "lora": lora}
        settings = ("weights", "scheduler", "guidance_scale", "negative_prompt", "eta")
        options = {"scheduler_options": self.scheduler_options} if self.scheduler_options else {}
        rule = vars(self.transition) if self.transition != Transition(eta=self.eta) else {}
        return super().identity | names | {name: getattr(self, name) for name in settings} | options | rule

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The configuration of the scheduler."""
        return self.kernel.config

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Conditioning:
        """Returns the encoded prompts and negative prompts (None without guidance)."""
        negatives = [self.negative_prompt if text is None else text for text in negative_prompts]
        guided = self.network_rows(self.guidance_scale) > 1
        if any(negatives) and not guided:
            settings = f"{type(self).__name__} computes no classifier-free guidance with these settings"
            warnings.warn(f"negative prompts have no effect: {settings}", stacklevel=4)
        positive = self._encode(list(prompts), self.encode_texts)
        negative = self._encode(negatives, self.encode_negative_texts) if guided else None
        self.release()
        return positive, negative

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the scheduler's first level."""
        return self.kernel.initial(noise)

    def denoise(self, x: Tensor, i: int, conditioning: Conditioning, row: Tensor) -> Denoised:
        """Evaluates the network with guidance and returns x0 and the kernel's mean."""
        t, scale = self.kernel.timestep_on(x.device, i), self.guidance_scale
        return self.kernel.predict(x, self.evaluate(self.kernel.scale_input(x, i), t, conditioning, row, scale), i)

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """One step without noise, in the scheduler's coordinates."""
        return self.kernel.flow(x, x0, i)

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Noises images to the scheduler's level i."""
        return self.kernel.renoise(x0, noise, i)

    def draw(self, x: Tensor, x0: Tensor, noise: Tensor, i: int, conditioning: Conditioning, row: Tensor) -> Tensor:
        """Draws x at step i + 1 by a GLASS transition."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.evaluate(x, t.to(x.device, non_blocking=True), conditioning, row, self.guidance_scale)

        return glass(self.kernel, x, x0, noise, i, network)

    def std(self, i: int) -> float:
        """Returns the scheduler's noise at step i; with inner steps 1, that of the noise which `draw` receives."""
        return self.kernel.std(i) if self.inner_steps == 1 else 1.0

    def load_decoder(self, name: str) -> nn.Module:
        """Loads an AutoencoderTiny; `tiny` is the one for this model."""
        source = name
        if name == "tiny":
            if self.tiny is None:
                raise UserError(f"there is no small decoder for {type(self).__name__}; give a folder or a hub name")
            source = str(ASSETS / "emoji-tiny") if self.pretrained in EMBEDDED else self.tiny
        options: Any = (self.dtype, self.local_files_only, self.parity)
        tiny: Any = TinyDecoder(source, self.latent_shape[0], *options)
        if self.compiled:
            compile_calls([tiny.decoder], self.chunker.reproducible is True)
        return tiny

    def _encode(self, texts: list[str], encode: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
        for name, tokenizer in self.tokenizers.items():
            encoder = name.replace("tokenizer", "text_encoder") if len(self.tokenizers) > 1 else "the text encoder"
            warn_of_cuts(tokenizer, texts, self.token_limit(tokenizer), encoder)
        # Text encoders compute once for each prompt, and several of them overflow where autocast is in float16.
        with quiet("diffusers", "transformers"), without_autocast(self.device.type):  # both libraries log the same
            return self.chunker.map(encode, len(texts), texts, work=("text encoder", self, encode.__qualname__))
