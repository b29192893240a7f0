"""Stable Diffusion 1.x and 2.x, and every model saved in the same pipeline format.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv 2112.10752.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.fingerprint import fingerprint
from svdd.diffusion.kernels import known_schedulers, make_kernel
from svdd.diffusion.tiny_decoder import TinyDecoder

__all__ = ["StableDiffusion"]

_MOST_TOKENS = 10_000


class StableDiffusion(Diffusion):
    """Stable Diffusion 1.x or 2.x: epsilon, v or sample prediction, with classifier-free guidance.

    Args:
        pretrained: `emoji` for the small model that ships with svdd, a folder, or a hub name such as
            `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        num_inference_steps: T, the number of denoising steps.
        guidance_scale: Weight of classifier-free guidance; at 1 or less the unconditional half is not computed.
        eta: Noise of the DDIM steps, 0 (deterministic) to 1 (as much as DDPM). Guided sampling needs some.
        scheduler: `ddim`, `ddpm` or `euler_ancestral`: the solvers whose step is a Gaussian kernel.
        negative_prompt: What to steer away from, for prompts that bring none of their own.
        height: Image height in pixels, a multiple of the autoencoder's factor (8); the model's own size by default.
        width: Image width in pixels.
        chunk_size: Latents that go through the network at once, or `auto`: all, halved when memory runs out.
        compile: Compile network and decoder with torch.compile.
        lora: Folder, file or hub name of LoRA weights to fuse into the model (needs `pip install 'svdd[lora]'`).
        revision: Branch, tag or commit of a hub model.
        variant: Weight files' variant, for example `fp16`.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If `pretrained` does not exist or is no Stable Diffusion pipeline.
        ValueError: If an argument is out of range or the scheduler has no Gaussian kernel.
    """

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
        compile: bool = False,
        lora: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(num_inference_steps, chunk_size)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in 0 .. 1, got {eta}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if scheduler not in known_schedulers():  # say so before gigabytes are read
            make_kernel(scheduler, {}, num_inference_steps, eta)
        source = str(files("svdd") / "assets" / "emoji-sd") if pretrained == "emoji" else pretrained
        local = local_files_only or pretrained == "emoji"
        pipeline = _load(source, revision=revision, variant=variant, local_files_only=local)
        if lora is not None:
            _load_lora(pipeline, lora)
        self.weights = fingerprint(pipeline.unet, pipeline.vae, pipeline.text_encoder)  # of files, not of arithmetic
        if lora is not None:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        # Parameters keep requires_grad=True, as diffusers loads them: on the CPU, PyTorch picks other convolution
        # kernels for frozen weights, and the last bit of every image would differ from the pipeline's.
        self.unet, self.vae, self.text_encoder = pipeline.unet.eval(), pipeline.vae.eval(), pipeline.text_encoder.eval()
        self.tokenizer = pipeline.tokenizer
        self.kernel = make_kernel(scheduler, dict(pipeline.scheduler.config), num_inference_steps, eta)
        self.guidance_scale, self.eta, self.negative_prompt = guidance_scale, eta, negative_prompt
        self.pretrained, self.lora, self.scheduler = pretrained, lora, scheduler
        self._latent_size = self._check_size(height, width)
        if compile:
            self.unet.compile()
            self.vae.decoder.compile()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, (c, h, w)."""
        return (self.unet.config.in_channels, *self._latent_size)

    @property
    def dtype(self) -> torch.dtype:
        """The text encoder's type, which is what diffusers gives latents."""
        return self.text_encoder.dtype

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.unet.device

    @property
    def network_rows_per_row(self) -> int:
        """2 where classifier-free guidance runs, else 1."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def identity(self) -> dict[str, Any]:
        """The model by its name without the path and by its weights, and how its chain runs."""
        return super().identity | {
            "pretrained": Path(self.pretrained).name,
            "lora": None if self.lora is None else Path(self.lora).name,
            "weights": self.weights,
            "scheduler": self.scheduler,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "eta": self.eta,
        }

    @property
    def prompt_features_size(self) -> int:
        """Width of the text encoder."""
        return int(self.text_encoder.config.hidden_size)

    def prompt_features(self, conditioning: tuple[Tensor, Tensor | None]) -> Tensor:
        """Returns the mean of each prompt's text states, [p, d]."""
        return conditioning[0].mean(1)

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> tuple[Tensor, Tensor | None]:
        """Returns the text states of prompts and of negative prompts (None without guidance), each [p, tokens, d]."""
        self._warn_of_cuts(prompts)
        positive = self.chunker.map(self._encode_text, len(prompts), list(prompts))
        if self.guidance_scale <= 1:
            return positive, None
        negatives = [self.negative_prompt if negative is None else negative for negative in negative_prompts]
        self._warn_of_cuts(negatives)
        return positive, self.chunker.map(self._encode_text, len(negatives), negatives)

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the scheduler's first level."""
        return self.kernel.initial(noise)

    def denoise(self, x: Tensor, i: int, conditioning: tuple[Tensor, Tensor | None], row: Tensor) -> Denoised:
        """Runs the UNet, with guidance w as uncond + w (cond - uncond), and reads x0 and the kernel's mean off it."""
        return self.kernel.predict(x, self._network(x, i, conditioning, row, self.guidance_scale), i)

    def preview(
        self, x: Tensor, i: int, conditioning: tuple[Tensor, Tensor | None], row: Tensor, guidance_scale: float
    ) -> Tensor:
        """Returns x0 under another guidance scale; at 1 or less the unconditional half is not computed."""
        if guidance_scale > 1 and conditioning[1] is None:
            raise UserError(
                f"a preview with guidance_scale={guidance_scale} needs a model with guidance; its own scale is "
                f"{self.guidance_scale}"
            )
        return self.kernel.predict(x, self._network(x, i, conditioning, row, guidance_scale), i).x0

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """One DDIM step with eta = 0, in the scheduler's coordinates."""
        return self.kernel.flow(x, x0, i)

    def load_decoder(self, name: str) -> nn.Module:
        """Loads an AutoencoderTiny: `tiny` is the embedded model's, or TAESD for every other Stable Diffusion."""
        return TinyDecoder(_tiny_source(name, self.pretrained), self.latent_shape[0], self.dtype)

    def std(self, i: int) -> float:
        """The scheduler's noise at step i."""
        return self.kernel.std(i)

    def decode(self, x0: Tensor) -> Tensor:
        """Runs the autoencoder's decoder."""
        images = self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def _network(
        self, x: Tensor, i: int, conditioning: tuple[Tensor, Tensor | None], row: Tensor, guidance_scale: float
    ) -> Tensor:
        positive, negative = conditioning
        model_input = self.kernel.scale_input(x, i)
        t = self.kernel.timesteps[i].to(x.device)
        if negative is None or guidance_scale <= 1:
            return self.unet(model_input, t, encoder_hidden_states=positive[row], return_dict=False)[0]
        states = torch.cat([negative[row], positive[row]])
        pair = self.unet(torch.cat([model_input] * 2), t, encoder_hidden_states=states, return_dict=False)[0]
        unconditional, conditional = pair.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _encode_text(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if uses_mask else None
        return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        limit = self.tokenizer.model_max_length
        for text in dict.fromkeys(texts):
            ids = self.tokenizer(text, truncation=False, verbose=False).input_ids
            if len(ids) > limit:
                lost = self.tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
                shown = text if len(text) <= 60 else text[:57] + "..."
                warnings.warn(
                    f"a prompt has {len(ids)} tokens and the text encoder reads {limit}; cut off: {lost!r} "
                    f"(prompt: {shown!r})",
                    stacklevel=4,
                )

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample = self.unet.config.sample_size
        native = (sample, sample) if isinstance(sample, int) else tuple(sample)
        size = []
        for name, pixels, latent in (("height", height, native[0]), ("width", width, native[1])):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name} must be a positive multiple of {factor}, got {pixels}")
            size.append(latent if pixels is None else pixels // factor)
        return size[0], size[1]


def _tiny_source(name: str, pretrained: str) -> str:
    """Returns the folder or hub name of a decoder; `tiny` depends on the model."""
    if name != "tiny":
        return name
    return str(files("svdd") / "assets" / "emoji-tiny") if pretrained == "emoji" else "madebyollin/taesd"


def _load(source: str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if path.exists() or looks_local:
        source = str(path)
        if not path.is_dir():
            raise UserError(
                f"pretrained={source!r} is not a folder; expected `emoji`, a folder that holds a Stable Diffusion "
                "pipeline (model_index.json), or a hub name such as stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        if not (path / "model_index.json").is_file():
            raise UserError(
                f"pretrained={source!r} has no model_index.json, so it is no diffusers pipeline; save one with "
                "StableDiffusionPipeline.save_pretrained, or convert a single file with from_single_file first"
            )
    try:
        index = DiffusionPipeline.load_config(source, **{k: v for k, v in options.items() if k != "variant"})
        if index["_class_name"] != StableDiffusionPipeline.__name__:
            raise UserError(
                f"pretrained={source!r} is a {index['_class_name']}; this class takes a StableDiffusionPipeline "
                "(Stable Diffusion 1.x or 2.x)"
            )
        with _quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                source, safety_checker=None, feature_extractor=None, dtype=torch.float32, **options
            )
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"pretrained={source!r} cannot be loaded: {reason}") from error
    if pipeline.tokenizer.model_max_length > _MOST_TOKENS:  # transformers makes up an empty one where files are missing
        raise UserError(
            f"pretrained={source!r} has no usable tokenizer; its folder `tokenizer` is missing or incomplete"
        )
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back loading bars, and the remark that there is no safety checker: rewards and users judge the images."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    diffusers_logging.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bar()


def _load_lora(pipeline: Any, lora: str) -> None:
    try:
        pipeline.load_lora_weights(lora)
    except (ValueError, ImportError) as error:
        if "PEFT" in str(error).upper():
            raise UserError(f"lora={lora!r} needs the peft package: pip install 'svdd[lora]'") from error
        raise UserError(f"lora={lora!r} cannot be loaded: {error}") from error
    except OSError as error:
        raise UserError(f"lora={lora!r} cannot be loaded: {str(error).splitlines()[0]}") from error
