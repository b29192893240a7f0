"""The beginning of a batch of images."""

from collections.abc import Sequence
from typing import Any

import torch

from svdd.diffusion.base import Diffusion
from svdd.state.context import Context
from svdd.state.scoring import threads_of
from svdd.state.state import State

__all__ = ["Start", "choose_rows"]


class Start:
    """Begins the chain of a batch of images: `start(n)` returns n rows per image of pure noise, at i = 0.

    Prompts are encoded once. A second call continues the images' random streams, and returns other rows.

    Args:
        diffusion: The chain.
        prompts: One per image.
        seeds: One per image, 0 .. 2^64 - 1; they determine every random number of the image.
        negative_prompts: One per image, or None for the model's default throughout.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str | None] | None = None,
    ) -> None:
        self.context = Context.encode(diffusion, prompts, seeds, negative_prompts)
        self._begun = 0

    def __call__(self, n: int = 1) -> State:
        """Draws n >= 1 starting rows per image."""
        state = State.begin(self.context, n, self._begun)
        self._begun += n
        return state


def choose_rows(model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """In the reproducible mode, chooses the rows at once before anything is drawn, where memory may be short.

    Args:
        model: A `GuidedDiffusion`.
        prompts: Of the image with which one row is measured.
        seeds: As many.
    """
    diffusion = model.diffusion
    if not diffusion.chunker.must_choose:
        return
    row = torch.zeros(1, *diffusion.latent_shape, dtype=diffusion.dtype, device=diffusion.device)
    if diffusion.chunker.may_be_short(row):
        with diffusion.chunker.choosing():
            state = Start(diffusion, prompts, seeds)()
            if model.sampler.needs_gradient:
                state.gradient(model.value)
            for reward in model.rewards.values():
                if not (threads_of(reward) or getattr(reward, "groupwise", False)):
                    state.scores(reward)
    diffusion.chunker.choose()
