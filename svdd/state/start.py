"""The beginning of a batch of images."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from svdd.diffusion.base import Diffusion
from svdd.state.context import Context, Scorer
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


def choose_rows(
    diffusion: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    value: Callable[[State], Tensor] | None = None,
    rewards: Iterable[Scorer] = (),
) -> None:
    """In the reproducible mode, chooses the rows at once before anything is drawn, where memory may be short.

    Args:
        diffusion: The chain.
        prompts: Of the image with which one row is measured.
        seeds: As many.
        value: Of rows, if its gradient is needed.
        rewards: All that score images.
    """
    if not diffusion.chunker.must_choose:
        return
    row = torch.zeros(1, *diffusion.latent_shape, dtype=diffusion.dtype, device=diffusion.device)
    if diffusion.chunker.may_be_short(row):
        with diffusion.chunker.choosing():
            state = Start(diffusion, prompts, seeds)()
            if value is not None:
                state.gradient(value)
            for reward in rewards:
                if not (threads_of(reward) or getattr(reward, "groupwise", False)):
                    state.scores(reward)
    diffusion.chunker.choose()
