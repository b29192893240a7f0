"""What all states of one batch share: the chain, the prompts, the random numbers, the ledger and the trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svdd.diffusion.base import Diffusion
from svdd.diffusion.preview import Preview
from svdd.state.finite import Finiteness, require_finite
from svdd.state.ledger import Ledger
from svdd.state.recorder import Recorder
from svdd.state.stream import Stream, draw_ahead
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
    generators: list[Stream]  # noise of each image, on the CPU
    choosers: list[Stream]  # random numbers of each image's selections, on the CPU
    texts: list[str]  # the prompt of each image
    ledger: Ledger = field(default_factory=Ledger)
    trace: Trace = field(default_factory=Trace)
    on_step: Callable[[int, float | None], None] | None = None
    preview: Preview | None = None  # what evaluations must record for the previews of their children
    images: list[int] = field(default_factory=list)  # each image's position in the batch
    recorder: Recorder | None = None
    finiteness: Finiteness = field(default_factory=Finiteness)
    ahead: bool = False  # whether the next noise is drawn while the device works
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
                states = states.where(states != -torch.inf, 0).reshape(len(texts), -1)  # masks have -inf
                require_finite("text encoder", states.new_zeros(len(texts), 1), states, prompt=texts.__getitem__)
        return cls(
            diffusion,
            conditioning,
            texts,
            torch.tensor([distinct[key] for key in keys]).to(diffusion.device),
            [Stream.seeded(seed) for seed in seeds],
            [Stream.seeded(seed ^ _SELECTION_STREAM) for seed in seeds],
            [texts[distinct[key]] for key in keys],
            images=list(range(len(seeds))),
            finiteness=Finiteness(late=diffusion.device.type != "cpu"),
            ahead=diffusion.device.type != "cpu",  # on a CPU it would take a core from the network
        )

    def report(self, i: int, values: Tensor | None = None) -> None:
        """Calls `on_step`, if there is one, with the mean of the finite values."""
        if self.on_step is not None:
            self.on_step(i, None if values is None else float(values[values.isfinite()].detach().mean()))

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
        return torch.stack([chooser.uniforms(k) for chooser in self.choosers])

    def replay(self) -> "Context":
        """Returns a context that draws this one's next noise, the same for all rows of an image; the rest is shared."""
        clones = [generator.clone() for generator in self.generators]
        return replace(self, generators=clones, shared_noise=True)

    def of(self, images: Tensor) -> "Context":
        """Returns the context of some images, int64 [k]; ledger, trace, recorder and random generators stay shared."""
        own = images.tolist()
        names = ("generators", "choosers", "texts", "images")
        each: dict[str, Any] = {name: [getattr(self, name)[k] for k in own] for name in names}
        return replace(self, rows=self.rows[images], **each)

    def _normals(self, streams: list[Stream], n: int) -> Tensor:
        shape, dtype = (n, *self.diffusion.latent_shape), self.diffusion.dtype
        wide = torch.promote_types(dtype, torch.float32)  # half precision may have another sequence
        normals = torch.cat([stream.normals(shape, wide).to(dtype) for stream in streams])
        if self.ahead and streams is self.generators:
            draw_ahead(streams, shape, wide)
        if self.diffusion.device.type == "cuda":
            normals = normals.pin_memory().to(self.diffusion.device, non_blocking=True)
        return normals
