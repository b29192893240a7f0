"""Loops that a user writes over a pipeline of diffusers, to which benchmarks/hardware.py compares svdd.

They use the pipeline's own parts alone, for one picture per call or for all candidates of a step in one call.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor

__all__ = ["Calls", "PlainLoops", "kilobytes"]


def kilobytes(picture: Tensor) -> float:
    """Returns minus the size of a picture, float [3, h, w] in [0, 1], as a JPEG file of quality 95 in kB."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG", quality=95)
    return -buffer.tell() / 1000


class Calls:
    """Counts the rows of all calls of a pipeline's network and decoder within a `with` block."""

    def __init__(self, pipe: Any) -> None:
        self.network, self.decoder = 0, 0
        self._parts = {"network": network_of(pipe), "decoder": pipe.vae.decoder}

    def __enter__(self) -> "Calls":
        self._hooks = [
            part.register_forward_pre_hook(self._hook(k), with_kwargs=True) for k, part in self._parts.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, kind: str) -> Callable[..., None]:
        def count(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            rows = arguments[0] if arguments else named.get("hidden_states", named.get("sample"))
            setattr(self, kind, getattr(self, kind) + len(rows))

        return count


def network_of(pipe: Any) -> Any:
    """Returns the UNet or the transformer of a pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


class PlainLoops:
    """SVDD and best of N for one prompt, guided by the size of the JPEG file at alpha = 0.

    Args:
        pipe: A pipeline of Stable Diffusion, SDXL, Stable Diffusion 3 or FLUX.1.
        steps: T.
        scale: The guidance scale.
        pixels: Height and width.
    """

    def __init__(self, pipe: Any, steps: int, scale: float, pixels: int) -> None:
        self.pipe, self.steps, self.scale, self.pixels = pipe, steps, scale, pixels
        self.network, self.device = network_of(pipe), network_of(pipe).device
        self.dtype, self.side = self.network.dtype, pixels // pipe.vae_scale_factor
        self.flux, self.flow = hasattr(pipe, "_pack_latents"), hasattr(pipe, "transformer")
        pipe.set_progress_bar_config(disable=True)
        if not self.flow:
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def best_of_n(self, prompt: str, n: int, together: bool = False) -> Tensor:
        """N calls of the pipeline, or one with `num_images_per_prompt`; returns the picture of the smallest file."""
        options: dict[str, Any] = {} if self.flow else {"eta": 1.0}
        options |= {"height": self.pixels, "width": self.pixels, "output_type": "latent"}
        best: tuple[float, Tensor] | None = None
        for k in range(1 if together else n):
            latents = self.pipe(
                prompt,
                num_inference_steps=self.steps,
                guidance_scale=self.scale,
                num_images_per_prompt=n if together else 1,
                generator=torch.Generator(self.device).manual_seed(k),
                **options,
            ).images
            for picture in self._decode(latents):
                if best is None or kilobytes(picture) > best[0]:
                    best = kilobytes(picture), picture
        assert best is not None
        return best[1]

    @torch.no_grad()
    def svdd(self, prompt: str, candidates: Sequence[int], together: bool = False) -> Tensor:
        """Soft value-based decoding with so many candidates in each step, one by one or those of a step at once.

        The prediction of the candidate that is kept is that of the next step's parent.
        """
        self._begin(prompt)
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.side**2 // 4, 64) if self.flux else (1, self.pipe.vae.config.latent_channels, *[self.side] * 2)
        x = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        x = x * getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)
        output, picture = self._evaluate(x, 0), x
        for i, m in enumerate(candidates):
            best: tuple[float, Tensor, Tensor, Tensor] | None = None
            last, rows = i + 1 == self.steps, m if together else 1
            for _ in range(m // rows):
                y = self._step(x.expand(rows, *x.shape[1:]), output, i, generator)
                its = y if last else self._evaluate(y, i + 1)
                if m == 1 and not last:  # nothing to choose from
                    best = 0.0, y, its, y
                    continue
                pictures = self._decode(y if last else self._clean(y, its, i + 1))
                for k in range(rows):
                    if best is None or kilobytes(pictures[k]) > best[0]:
                        best = kilobytes(pictures[k]), y[k : k + 1], its[k : k + 1], pictures[k]
            assert best is not None
            _, x, output, picture = best
        return picture

    def _begin(self, prompt: str) -> None:
        """Encodes the prompt and sets the timesteps."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        guided = {"device": self.device, "do_classifier_free_guidance": self.scale > 1}
        options: dict[str, Any] = {"num_inference_steps": self.steps}
        if self.flux:
            found = pipe.encode_prompt(prompt, None, device=self.device)
            sigmas, ends = np.linspace(1.0, 1 / self.steps, self.steps), ("base_image_seq_len", "max_image_seq_len")
            shifts = [scheduler.config[name] for name in (*ends, "base_shift", "max_shift")]
            options = {"sigmas": sigmas, "mu": calculate_shift(self.side**2 // 4, *shifts)}
        elif self.flow:
            found = pipe.encode_prompt(prompt, None, None, **guided)
        elif hasattr(pipe, "text_encoder_2"):
            found = pipe.encode_prompt(prompt, **guided)
        else:
            found = pipe.encode_prompt(prompt, num_images_per_prompt=1, **guided)
        scheduler.set_timesteps(device=self.device, **options)
        self._texts = self._pairs(*found[:2]) if not self.flux else found[0]
        self._pooled = found[1] if self.flux else self._pairs(*found[2:4]) if len(found) > 2 else None

    def _pairs(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        return positive if negative is None or self.scale <= 1 else torch.cat([negative, positive])

    def _evaluate(self, x: Tensor, i: int) -> Tensor:
        """Returns the network's output with guidance."""
        t, n = self.pipe.scheduler.timesteps[i], len(x)
        if self.flux:
            ids = self.pipe._prepare_latent_image_ids(1, self.side // 2, self.side // 2, self.device, self.dtype)
            guidance = torch.full([n], self.scale, device=self.device) if self.network.config.guidance_embeds else None
            return self.network(
                hidden_states=x,
                timestep=t.expand(n).to(self.dtype) / 1000,
                guidance=guidance,
                pooled_projections=self._pooled.expand(n, -1),
                encoder_hidden_states=self._texts.expand(n, -1, -1),
                txt_ids=torch.zeros(self._texts.shape[1], 3, device=self.device, dtype=self.dtype),
                img_ids=ids,
                return_dict=False,
            )[0]
        halves = len(self._texts)
        texts, rows = self._texts.repeat_interleave(n, 0), torch.cat([x] * halves)
        pooled = None if self._pooled is None else self._pooled.repeat_interleave(n, 0)
        if self.flow:
            t = t.expand(len(rows))
            output = self.network(rows, texts, pooled, t, return_dict=False)[0]
        else:
            size = [self.pixels, self.pixels]
            numbers = torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype).repeat(len(rows), 1)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": numbers}
            output = self.network(rows, t, texts, added_cond_kwargs=added, return_dict=False)[0]
        if halves == 1:
            return output
        negative, positive = output.chunk(2)
        return negative + self.scale * (positive - negative)

    def _step(self, x: Tensor, output: Tensor, i: int, generator: torch.Generator) -> Tensor:
        """Draws the next latents, with all of the noise new in a flow model."""
        scheduler = self.pipe.scheduler
        if self.flow:
            noise = torch.randn(x.shape, generator=generator, device=self.device, dtype=self.dtype)
            level = scheduler.sigmas[i + 1].to(self.dtype)
            return (1 - level) * self._clean(x, output, i) + level * noise
        t, output = scheduler.timesteps[i], output.expand(len(x), *output.shape[1:])
        return scheduler.step(output, t, x, eta=1.0, generator=generator, return_dict=False)[0]

    def _clean(self, x: Tensor, output: Tensor, i: int) -> Tensor:
        """Returns the prediction of the clean latents."""
        if self.flow:
            return x - self.pipe.scheduler.sigmas[i].to(self.dtype) * output
        share = self.pipe.scheduler.alphas_cumprod.to(self.device)[self.pipe.scheduler.timesteps[i]].to(self.dtype)
        if self.pipe.scheduler.config.prediction_type == "v_prediction":
            return share.sqrt() * x - (1 - share).sqrt() * output
        return (x - (1 - share).sqrt() * output) / share.sqrt()

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Returns pictures, float [n, 3, h, w] in [0, 1]."""
        vae = self.pipe.vae
        if self.flux:
            latents = self.pipe._unpack_latents(latents, self.pixels, self.pixels, self.pipe.vae_scale_factor)
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
