"""What all states of one batch share: the chain, the prompts, the random numbers, the ledger and the trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svdd.diffusion.base import Diffusion
from svdd.diffusion.preview import Preview
from svdd.state.finite import require_finite
from svdd.state.ledger import Ledger
from svdd.state.recorder import Recorder
from svdd.state.trace import Trace

__all__ = ["Context", "Scorer"]

_MAX_SEED = 2**64 - 1
_SELECTION_STREAM = 0x5DEECE66D  # selections draw from a separate stream, so that they never shift the noise


class Scorer(Protocol):
    """Anything with the scoring method of `svdd.rewards.base.Reward`."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one finite score per image, float32 [n]."""


@dataclass
class Context:
    """What all states of one batch share.

    `on_step` is called with (step index, mean value or None) after every proposal and every evaluated value.
    """

    diffusion: Diffusion
    conditioning: Any  # the encoded distinct prompts
    prompts: list[str]  # their texts; `State.row` indexes them
    rows: Tensor  # index of each image's prompt, int64 [images], on the diffusion's device
    generators: list[torch.Generator]  # noise of each image, on the CPU
    choosers: list[torch.Generator]  # random numbers of each image's selections, on the CPU
    ledger: Ledger = field(default_factory=Ledger)
    trace: Trace = field(default_factory=Trace)
    on_step: Callable[[int, float | None], None] | None = None
    preview: Preview | None = None  # what evaluations must record for the previews of their children
    images: list[int] = field(default_factory=list)  # each image's position in the batch
    recorder: Recorder | None = None
    shared_noise: bool = False  # all rows of an image receive the same noise, so an end depends on the start alone

    @classmethod
    def encode(
        cls,
        diffusion: Diffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str | None] | None = None,
    ) -> "Context":
        """Encodes the distinct prompts and seeds two generators per image; see `Start`."""
        negatives = [None] * len(prompts) if negative_prompts is None else negative_prompts
        if not len(prompts) == len(seeds) == len(negatives) > 0:
            raise ValueError(
                "prompts, seeds and negative_prompts need one entry per image and at least one image, "
                f"got {len(prompts)}, {len(seeds)} and {len(negatives)}"
            )
        if bad := [seed for seed in seeds if not 0 <= seed <= _MAX_SEED]:
            raise ValueError(f"a seed must lie in 0 .. {_MAX_SEED}, got {bad[0]}")
        keys = list(zip(prompts, map(type, prompts), negatives, strict=True))  # a text with columns equals one without
        distinct = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        texts = [text for text, _, _ in distinct]
        conditioning = diffusion.encode([str(text) for text in texts], [negative for _, _, negative in distinct])
        for states in tree_leaves(conditioning):
            if isinstance(states, Tensor) and states.is_floating_point() and states.shape[:1] == (len(texts),):
                states = states[:, None].where(states[:, None] != -torch.inf, 0)  # of masks; some have one number a row
                require_finite("text encoder", states.new_zeros(len(texts), 1), states, prompt=texts.__getitem__)
        return cls(
            diffusion,
            conditioning,
            texts,
            torch.tensor([distinct[key] for key in keys]).to(diffusion.device),
            [torch.Generator().manual_seed(seed) for seed in seeds],
            [torch.Generator().manual_seed(seed ^ _SELECTION_STREAM) for seed in seeds],
            images=list(range(len(seeds))),
        )

    def report(self, i: int, value: float | None = None) -> None:
        """Calls `on_step`, if there is one."""
        if self.on_step is not None:
            self.on_step(i, value)

    def noise(self, n: int) -> Tensor:
        """Draws n rows of noise per image, [images * n, *latent_shape], as diffusers does for a list of generators."""
        if self.shared_noise:
            return self._normals(self.generators, 1).repeat_interleave(n, 0)
        return self._normals(self.generators, n)

    def perturbations(self, n: int) -> Tensor:
        """Draws as many normal numbers from the selection stream, which never shifts the noise."""
        return self._normals(self.choosers, n)

    def uniforms(self, k: int) -> Tensor:
        """Draws k uniform numbers in [0, 1) per image from the selection stream, float64 [images, k]."""
        return torch.stack([torch.rand(k, generator=chooser, dtype=torch.float64) for chooser in self.choosers])

    def replay(self) -> "Context":
        """Returns a context that draws this one's next noise, the same for all rows of an image; the rest is shared."""
        clones = [generator.clone_state() for generator in self.generators]
        return replace(self, generators=clones, shared_noise=True)

    def of(self, images: Tensor) -> "Context":
        """Returns the context of some images, int64 [k]; ledger, trace, recorder and random generators stay shared."""
        generators, choosers = ([streams[k] for k in images.tolist()] for streams in (self.generators, self.choosers))
        positions = [self.images[k] for k in images.tolist()]
        return replace(self, rows=self.rows[images], generators=generators, choosers=choosers, images=positions)

    def _normals(self, generators: list[torch.Generator], n: int) -> Tensor:
        shape, dtype = (n, *self.diffusion.latent_shape), self.diffusion.dtype
        wide = torch.promote_types(dtype, torch.float32)  # half precision may have another sequence
        return torch.cat([torch.randn(shape, generator=each, dtype=wide).to(dtype) for each in generators])
