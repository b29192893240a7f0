"""A batch of particles at one step of the reverse chain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from svdd.diffusion.base import Denoised, Diffusion
from svdd.ledger import Ledger

__all__ = ["Context", "Scorer", "State", "start"]

_MAX_SEED = 2**63 - 1
_SELECTION_STREAM = 0x5DEECE66D  # selection draws from a stream of its own, so that it never shifts the noise


class Scorer(Protocol):
    """Anything with the scoring method of `svdd.rewards.base.Reward`."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one finite score per image, float32 [n]."""


@dataclass
class Context:
    """What all states of one sampling run share.

    Args:
        diffusion: The chain.
        conditioning: Encoded distinct prompts.
        prompts: The distinct prompts' texts; `State.row` indexes them.
        generators: Noise of each image, on the CPU.
        choosers: Uniform numbers of each image's selections, on the CPU.
        ledger: What the run has spent.
        on_step: Called with (step index, mean value or None) after every proposal and every evaluated value.
    """

    diffusion: Diffusion
    conditioning: Any
    prompts: list[str]
    generators: list[torch.Generator]
    choosers: list[torch.Generator]
    ledger: Ledger = field(default_factory=Ledger)
    on_step: Callable[[int, float | None], None] | None = None

    def report(self, i: int, value: float | None = None) -> None:
        """Tells whoever watches how far the run is."""
        if self.on_step is not None:
            self.on_step(i, value)


@dataclass(frozen=True)
class State:
    """Particles at step i; rows are prompt-major, then image, then particle.

    A state computes its denoised prediction at most once, when first asked; `select` hands it to the survivors.

    Args:
        x: Latents at step i, [n, c, h, w].
        i: Step index, 0 .. T; T is the end of the chain.
        row: Index of each particle's prompt, int64 [n].
        context: What the states of the run share.
    """

    x: Tensor
    i: int
    row: Tensor
    context: Context = field(repr=False)
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_images(self) -> int:
        """Images in the batch; each owns an equal group of consecutive rows."""
        return len(self.context.generators)

    @property
    def done(self) -> bool:
        """Whether the chain has ended: i = T."""
        return self.i == self.context.diffusion.num_inference_steps

    @property
    def std(self) -> float:
        """Standard deviation of the kernel that leaves this state; 0 at the end."""
        return 0.0 if self.done else self.context.diffusion.std(self.i)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row."""
        return [self.context.prompts[index] for index in self.row.tolist()]

    @property
    def prediction(self) -> Denoised:
        """The denoiser's answer at x, evaluated once.

        Raises:
            ValueError: At the end of the chain, where there is nothing left to denoise.
        """
        if self.done:
            raise ValueError("the chain has ended (i = T): x is the image's latent and x0 equals it")
        if "prediction" not in self._cache:
            self._cache["prediction"] = self._denoise()
        return self._cache["prediction"]

    @property
    def x0(self) -> Tensor:
        """Posterior mean E[x_0 | x_i], [n, c, h, w]; at the end it is x itself."""
        return self.x if self.done else self.prediction.x0

    @property
    def images(self) -> Tensor:
        """The decoded x0, float32 [n, 3, H, W] in [0, 1]; decoded once."""
        if "images" not in self._cache:
            diffusion, ledger = self.context.diffusion, self.context.ledger
            x0 = self.x0
            with ledger.timed("decoder_seconds", self.x.device):
                self._cache["images"] = diffusion.chunker.map(diffusion.decode, len(x0), x0)
            ledger.decoded_images += len(x0)
        return self._cache["images"]

    def scores(self, reward: Scorer) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]."""
        images, prompts, ledger = self.images, self.prompts, self.context.ledger
        with ledger.timed("reward_seconds", self.x.device):
            scores = self.context.diffusion.chunker.map(reward.score, len(images), images, prompts)
        ledger.reward_calls += len(images)
        return scores

    def propose(self, m: int = 1, mean: Tensor | None = None) -> "State":
        """Draws m children per row from the reverse kernel N(mean, std^2 I).

        Args:
            m: Children per row; they are consecutive (parent-major).
            mean: The kernel's mean [n, c, h, w] where a sampler shifts it; the model's own by default.

        Raises:
            ValueError: If m is below 1, or at the end of the chain.
        """
        if self.done:
            raise ValueError("the chain has ended (i = T): there is no kernel to draw from")
        if m < 1:
            raise ValueError(f"m must be >= 1, got {m}")
        mean = self.prediction.mean if mean is None else mean
        x = mean.repeat_interleave(m, 0) if m > 1 else mean
        if self.std > 0:
            x = x + self.std * _draw(self.context, len(x) // self.num_images).to(x)
        child = State(x, self.i + 1, self.row.repeat_interleave(m), self.context)
        self.context.report(child.i)
        return child

    def select(self, index: Tensor) -> "State":
        """Keeps some rows of every group, and what is already known about them.

        Args:
            index: int64 [groups, k]; entry (g, j) counts within group g, the g-th of `groups` equal runs of rows.

        Raises:
            ValueError: If `index` is not a matrix, the rows do not divide into that many groups, or an index leaves
                its group.
        """
        if index.ndim != 2:
            raise ValueError(f"index must have shape [groups, k], got {list(index.shape)}")
        groups, n = index.shape[0], len(self.x)
        if groups < 1 or n % groups:
            raise ValueError(f"index has {groups} groups, which do not divide {n} rows evenly")
        size = n // groups
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"index must stay within its group of {size} rows, got {index.min()} .. {index.max()}")
        offsets = torch.arange(groups, device=index.device)[:, None] * size
        flat = (index + offsets).flatten().to(self.x.device)
        cache: dict[str, Any] = {}
        if "prediction" in self._cache:
            cache["prediction"] = Denoised(*(part[flat] for part in self._cache["prediction"]))
        if "images" in self._cache:
            cache["images"] = self._cache["images"][flat]
        return replace(self, x=self.x[flat], row=self.row[flat.to(self.row.device)], _cache=cache)

    def uniforms(self, k: int) -> Tensor:
        """Returns k uniform numbers in [0, 1) for each image from its own selection stream, float64 [images, k]."""
        draws = [torch.rand(k, generator=chooser, dtype=torch.float64) for chooser in self.context.choosers]
        return torch.stack(draws).to(self.x.device)

    def _denoise(self) -> Denoised:
        context, diffusion, n = self.context, self.context.diffusion, len(self.x)

        def denoise(x: Tensor, row: Tensor) -> Denoised:
            return diffusion.denoise(x, self.i, context.conditioning, row)

        with context.ledger.timed("denoiser_seconds", self.x.device):
            denoised = diffusion.chunker.map(denoise, n, self.x, self.row)
        context.ledger.denoiser_rows += n
        context.ledger.network_rows += n * diffusion.network_rows_per_row
        return denoised


def start(
    diffusion: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_particles: int = 1,
    negative_prompts: Sequence[str | None] | None = None,
) -> State:
    """Returns the state at i = 0; see `Diffusion.start`."""
    negatives = list(negative_prompts) if negative_prompts is not None else [None] * len(prompts)
    if not len(prompts) == len(seeds) == len(negatives) > 0:
        raise ValueError(
            "prompts, seeds and negative_prompts need one entry per image and at least one image, "
            f"got {len(prompts)}, {len(seeds)} and {len(negatives)}"
        )
    if num_particles < 1:
        raise ValueError(f"num_particles must be >= 1, got {num_particles}")
    if bad := [seed for seed in seeds if not 0 <= seed <= _MAX_SEED]:
        raise ValueError(f"a seed must lie in 0 .. {_MAX_SEED}, got {bad[0]}")
    pairs = list(zip(prompts, negatives, strict=True))
    distinct = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
    texts = [text for text, _ in distinct]
    conditioning = diffusion.encode(texts, [negative for _, negative in distinct])
    context = Context(
        diffusion,
        conditioning,
        texts,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        choosers=[torch.Generator().manual_seed(seed ^ _SELECTION_STREAM) for seed in seeds],
    )
    noise = _draw(context, num_particles).to(diffusion.device)
    row = torch.tensor([distinct[pair] for pair in pairs]).repeat_interleave(num_particles)
    return State(diffusion.initial(noise), 0, row.to(diffusion.device), context)


def _draw(context: Context, rows_per_image: int) -> Tensor:
    """Draws [images * rows_per_image, c, h, w] normal numbers, each image's from its own generator.

    One row per image is what diffusers draws for a list of generators.
    """
    shape, dtype = (rows_per_image, *context.diffusion.latent_shape), context.diffusion.dtype
    return torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in context.generators])
