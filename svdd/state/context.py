"""What all states of one sampling run share: the chain, the prompts, the random numbers and the books."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from svdd.diffusion.base import Diffusion
from svdd.state.ledger import Ledger
from svdd.state.trace import Trace

__all__ = ["Context"]


@dataclass
class Context:
    """What all states of one sampling run share.

    Args:
        diffusion: The chain.
        conditioning: Encoded distinct prompts.
        prompts: The distinct prompts' texts; `State.row` indexes them.
        generators: Noise of each image, on the CPU.
        choosers: Random numbers of each image's selections, on the CPU.
        ledger: What the run has spent.
        trace: The choices that were made.
        on_step: Called with (step index, mean value or None) after every proposal and every evaluated value.
        shared_noise: Whether all rows of an image receive the same noise, so that an end depends on the start alone.
    """

    diffusion: Diffusion
    conditioning: Any
    prompts: list[str]
    generators: list[torch.Generator]
    choosers: list[torch.Generator]
    ledger: Ledger = field(default_factory=Ledger)
    trace: Trace = field(default_factory=Trace)
    on_step: Callable[[int, float | None], None] | None = None
    shared_noise: bool = False

    def report(self, i: int, value: float | None = None) -> None:
        """Tells whoever watches how far the run is."""
        if self.on_step is not None:
            self.on_step(i, value)

    def noise(self, rows_per_image: int) -> Tensor:
        """Draws [images * rows_per_image, c, h, w] normal numbers, each image's from its own generator.

        One row per image is what diffusers draws for a list of generators.
        """
        if self.shared_noise:
            return self._normals(self.generators, 1).repeat_interleave(rows_per_image, 0)
        return self._normals(self.generators, rows_per_image)

    def perturbations(self, rows_per_image: int) -> Tensor:
        """Draws as many normal numbers from the selection stream, which never shifts the noise."""
        return self._normals(self.choosers, rows_per_image)

    def uniforms(self, k: int) -> Tensor:
        """Returns k uniform numbers in [0, 1) for each image from its own selection stream, float64 [images, k]."""
        return torch.stack([torch.rand(k, generator=chooser, dtype=torch.float64) for chooser in self.choosers])

    def replay(self) -> "Context":
        """Returns a context that will draw the noise that this one would draw next, the same for all rows of an image.

        Prompts, selection streams, ledger and trace stay shared.
        """
        clones = [torch.Generator() for _ in self.generators]
        for clone, generator in zip(clones, self.generators, strict=True):
            clone.set_state(generator.get_state())
        return replace(self, generators=clones, shared_noise=True)

    def _normals(self, generators: list[torch.Generator], rows_per_image: int) -> Tensor:
        shape, dtype = (rows_per_image, *self.diffusion.latent_shape), self.diffusion.dtype
        return torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])
