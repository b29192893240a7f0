"""Draws the same pictures twice: with a pipeline's own `__call__`, and with `Unguided` on our class."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from diffusers.utils import logging

import svdd.diffusion
from svdd.diffusion.latent import LatentDiffusion
from svdd.samplers.unguided import Unguided
from svdd.state.start import Start
from svdd.values.posterior_mean import PosteriorMean
from tests.tiny_families import Family, Step

__all__ = ["GUIDANCE", "NUM_STEPS", "PROMPTS", "SEEDS", "Reference", "build", "draw"]

GUIDANCE = ("none", "guided", "negative prompts")
PROMPTS = ["a red apple on a wooden table", "panda", "a red apple on a wooden table"]
NEGATIVES = ["blurry", "dark and far away", ""]
SEEDS = [11, 2**40, 0]
NUM_STEPS = 3
logging.set_verbosity_error()


class Reference:
    """A saved pipeline as diffusers loads it."""

    def __init__(self, family: Family, folder: str, dtype: torch.dtype = torch.float32) -> None:
        self.family, self.kind = family, getattr(svdd.diffusion, family.kind)
        index = json.loads(Path(folder, "model_index.json").read_text())
        without = {name: None for name, part in index.items() if part == [None, None] or name == "safety_checker"}
        self.pipe = getattr(diffusers, self.kind.pipeline).from_pretrained(folder, dtype=dtype, **without)
        self.pipe.set_progress_bar_config(disable=True)
        self.saved = self.pipe.scheduler.config

    def draw(self, step: Step, guidance: str, size: tuple[int, int] | None, count: int) -> np.ndarray:
        """Returns `count` pictures, float32 [n, H, W, 3]; each has a generator of its own, for all of its noise."""
        family, options = self.family, {}
        if (size := size or family.own_size) is not None:
            options["height"], options["width"] = size
        if family.negative and guidance != "none":
            none = None if family.no_negative is None else [family.no_negative] * count
            options["negative_prompt"] = NEGATIVES[:count] if guidance == "negative prompts" else none
        if family.negative == "encoded":
            negatives, limit = options.pop("negative_prompt", None), family.call["max_sequence_length"]
            if negatives is not None:
                options["negative_prompt_embeds"] = self.pipe.encode_prompt(negatives, max_sequence_length=limit)[0]
        scheduler = getattr(diffusers, step.scheduler)
        self.pipe.scheduler = scheduler.from_config(self.saved, **{**family.settings, **step.settings})
        with _own_noise(self.pipe):
            return self.pipe(
                prompt=PROMPTS[:count],
                num_inference_steps=NUM_STEPS,
                generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:count]],
                output_type="np",
                **{**family.call, **step.call, **options, family.keyword: family.guidance[guidance == "none"]},
            ).images


@contextmanager
def _own_noise(pipe: Any) -> Iterator[None]:
    """Draws the noise of the flow scheduler as the pipeline draws its first latents, from the images' generators.

    The pipelines give this scheduler no generator, so it would draw packed latents from the global one.
    """
    prepare, given = pipe.prepare_latents, []

    def first(*args: Any, **kwargs: Any) -> Any:
        given[:] = [(args, kwargs)]
        return prepare(*args, **kwargs)

    def again(*_: Any, **__: Any) -> torch.Tensor:
        ((args, kwargs),) = given
        found = prepare(*args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    with (
        patch.object(pipe, "prepare_latents", first),
        patch.object(scheduling_flow_match_euler_discrete, "randn_tensor", again),
    ):
        yield


def build(
    family: Family, folder: str, guidance: str = "guided", size: tuple[int, int] | None = None, **options: Any
) -> LatentDiffusion:
    """Returns our class on a saved pipeline."""
    height, width = size or family.own_size or (None, None)
    return getattr(svdd.diffusion, family.kind)(
        folder,
        NUM_STEPS,
        height=height,
        width=width,
        **{"parity": True, **family.ours, family.argument: family.guidance[guidance == "none"], **options},
    )


@torch.no_grad()
def draw(diffusion: LatentDiffusion, guidance: str, count: int) -> np.ndarray:
    """Returns the pictures that `Reference.draw` returns, drawn by us."""
    negatives = NEGATIVES[:count] if guidance == "negative prompts" else None
    final = Unguided()(Start(diffusion, PROMPTS[:count], SEEDS[:count], negatives), PosteriorMean())
    return final.images.permute(0, 2, 3, 1).cpu().numpy()
