"""The beginning of a batch of images."""

from collections.abc import Sequence

from svdd.diffusion.base import Diffusion
from svdd.state.context import Context
from svdd.state.state import State

__all__ = ["Start"]


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
