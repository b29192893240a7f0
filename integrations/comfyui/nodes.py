"""The nodes: a reward, a sampler, and a KSampler that they guide."""

from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from svdd import UserError
from svdd.rewards.base import Reward
from svdd.rewards.weighted_sum import WeightedSum
from svdd.samplers.base import Sampler

from .chain import Drawn, GuidedSampler
from .registry import build, names

__all__ = ["GuidedKSampler", "RewardNode", "SamplerNode", "Terms"]

Terms = list[tuple[Reward, float]]  # ComfyUI's type SVDD_REWARD: rewards and their weights in a sum

_ARGUMENTS = "Its other arguments as YAML or JSON, such as 'pretrained: openai/clip-vit-large-patch14'."
_MOST_SEED = 2**64


class RewardNode:
    """A registered reward, or its sum with others."""

    RETURN_TYPES = ("SVDD_REWARD",)
    RETURN_NAMES = ("reward",)
    FUNCTION = "make"
    CATEGORY = "sampling/svdd"
    DESCRIPTION = "Scores finished images. Higher is better; a negative weight turns that round."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, for ComfyUI."""
        number = {"default": 1.0, "min": -1e6, "max": 1e6, "step": 0.05, "tooltip": "Factor in the sum."}
        return {
            "required": {
                "reward": (names("reward"), {"default": "CLIPScore", "tooltip": "`svdd list reward` describes them."}),
                "weight": ("FLOAT", number),
                "arguments": ("STRING", {"default": "", "multiline": True, "tooltip": _ARGUMENTS}),
            },
            "optional": {
                "plus": ("SVDD_REWARD", {"tooltip": "Rewards that are added to this one."}),
                "of": ("SVDD_REWARD", {"tooltip": "The reward that Threshold, WinRate and ZScored are made of."}),
            },
        }

    def make(
        self, reward: str, weight: float, arguments: str, plus: Terms | None = None, of: Terms | None = None
    ) -> tuple[Terms]:
        """Returns the reward and its weight, after those of `plus`."""
        with torch.inference_mode(False):
            inner = {} if of is None else {"reward": _sum(of)}
            return ([*(plus or []), (build("reward", reward, arguments, inner), weight)],)


class SamplerNode:
    """A registered sampler."""

    RETURN_TYPES = ("SVDD_SAMPLER",)
    RETURN_NAMES = ("sampler",)
    FUNCTION = "make"
    CATEGORY = "sampling/svdd"
    DESCRIPTION = "The algorithm that chooses among candidates."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, for ComfyUI."""
        count = {"default": 0, "min": 0, "max": 10_000, "tooltip": "Candidates, particles or iterations; 0: default."}
        alpha = {"default": 0.0, "min": 0.0, "max": 1e6, "step": 0.001, "round": False}
        alpha["tooltip"] = "Temperature in units of the reward; 0: the sampler's default, for SVDD the best candidate."
        return {
            "required": {
                "sampler": (names("sampler"), {"default": "SVDD", "tooltip": "`svdd list sampler` describes them."}),
                "count": ("INT", count),
                "alpha": ("FLOAT", alpha),
                "arguments": ("STRING", {"default": "", "multiline": True, "tooltip": _ARGUMENTS}),
            }
        }

    def make(self, sampler: str, count: int, alpha: float, arguments: str) -> tuple[Sampler]:
        """Returns the sampler; UserError if it needs gradients, which ComfyUI does not compute."""
        plain: Sampler = build("sampler", sampler, arguments, {"alpha": alpha} if alpha else {})
        if plain.needs_gradient:
            raise UserError(f"{sampler} needs gradients, which ComfyUI does not compute; use SVDD, SMC or BeamSearch")
        if not count:
            return (plain,)
        if plain.budget_argument is None:
            raise UserError(f"{sampler} has no count; set count to 0")
        given = {plain.budget_argument: count, **({"alpha": alpha} if alpha else {})}
        return (build("sampler", sampler, arguments, given),)


class GuidedKSampler:
    """Draws images of a loaded model, guided by a reward."""

    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("latent", "image", "report")
    FUNCTION = "sample"
    CATEGORY = "sampling/svdd"
    DESCRIPTION = "A KSampler whose images are steered towards a reward, by choosing among candidates at each step."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, for ComfyUI."""
        seed = {"default": 0, "min": 0, "max": _MOST_SEED - 1, "control_after_generate": True}
        seed["tooltip"] = "Image k of the batch has the seed + k."
        noise = "Noise of the steps: 1 as euler_ancestral; 0 as euler, where candidates would be copies."
        budget = "Denoiser rows that an image may cost, which set the sampler's count; 0: no budget."
        rows = "Latents that the model computes at once; ComfyUI reserves memory for as many."
        whole = "Share of the noise; below 1, images start from latent_image."
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "vae": ("VAE",),
                "latent_image": ("LATENT",),
                "reward": ("SVDD_REWARD",),
                "sampler": ("SVDD_SAMPLER",),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "The text that the rewards read."}),
                "seed": ("INT", seed),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10_000}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS,),
                "eta": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": noise}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": whole}),
                "budget": ("INT", {"default": 0, "min": 0, "max": 1_000_000, "tooltip": budget}),
                "rows_at_once": ("INT", {"default": 4, "min": 1, "max": 1024, "tooltip": rows}),
            },
            "optional": {"held_out": ("SVDD_REWARD", {"tooltip": "Rewards that are measured and do not guide."})},
        }

    def sample(
        self,
        model: Any,
        positive: list[Any],
        negative: list[Any],
        vae: Any,
        latent_image: dict[str, Any],
        reward: Terms,
        sampler: Sampler,
        prompt: str,
        seed: int,
        steps: int,
        cfg: float,
        scheduler: str,
        eta: float,
        denoise: float,
        budget: int,
        rows_at_once: int,
        held_out: Terms | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, str]:
        """Returns latents, images [n, h, w, 3] and a table of scores and costs."""
        if latent_image.get("noise_mask") is not None:
            raise UserError("latent_image has a mask; inpainting is not guided: use a latent without a mask")
        _refuse_batches(positive=positive, negative=negative)
        latents = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        if latents.is_nested or latents.ndim != 4:
            raise UserError(f"latent_image must be a batch of images [n, c, h, w], got {list(latents.shape)}")
        device = model.load_device
        sigmas = comfy.samplers.KSampler(model, steps, device, "euler", scheduler, denoise).sigmas
        numbers = latent_image.get("batch_index", range(len(latents)))
        guided = GuidedSampler(
            _sum(reward),
            sampler,
            [each for each, _ in held_out or []],
            vae,
            prompt,
            [(seed + int(k)) % _MOST_SEED for k in numbers],
            eta,
            rows_at_once,
            budget or None,
        )
        start = latents.repeat(-(-rows_at_once // len(latents)), 1, 1, 1)[: max(rows_at_once, len(latents))]
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        found = comfy.sample.sample_custom(
            *(model, torch.zeros_like(start), cfg, guided, sigmas, positive, negative, start),
            callback=callback,
            seed=seed,
        )
        images = torch.cat(guided.drawn.images)
        return {"samples": found}, images.movedim(1, -1), report(guided.drawn)


def report(drawn: Drawn) -> str:
    """Returns scores, one line for each image and their mean, and the work."""
    width = max(map(len, drawn.scores))
    lines = [drawn.model]
    for name, numbers in drawn.scores.items():
        shown = "  ".join(f"{number:.4f}" for number in numbers)
        lines.append(f"{name:<{width}}  {shown}  mean {sum(numbers) / len(numbers):.4f}")
    work = drawn.work
    lines.append(f"{work['denoiser_rows']:.0f} denoiser rows, {work['network_rows']:.0f} network rows, ")
    lines[-1] += f"{work['decoded_images']:.0f} decoded images, {work['reward_calls']:.0f} reward calls, "
    lines[-1] += f"{work['total_seconds']:.1f} s"
    return "\n".join(lines)


def _sum(terms: Terms) -> Reward:
    """Returns the reward itself if it is alone with weight 1, and else a weighted sum."""
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    return WeightedSum([reward for reward, _ in terms], [weight for _, weight in terms])


def _refuse_batches(**conditionings: Sequence[Any]) -> None:
    """Raises UserError for a conditioning with several prompts in one tensor: which row belongs to which is unknown."""
    for name, conditioning in conditionings.items():
        for states, _ in conditioning:
            if states is not None and len(states) > 1:
                raise UserError(f"{name} holds {len(states)} prompts in one batch; give one prompt, for all images")
