"""A batch of particles at one step of the reverse chain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Denoised, Diffusion
from svdd.state.context import Context

__all__ = ["Scorer", "State", "start"]

_MAX_SEED = 2**63 - 1
_SELECTION_STREAM = 0x5DEECE66D  # selection draws from a stream of its own, so that it never shifts the noise


class Scorer(Protocol):
    """Anything with the scoring method of `svdd.rewards.base.Reward`."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one finite score per image, float32 [n]."""


class _Slope(NamedTuple):
    """Values of rows, their gradient, and the prediction that came of the same evaluation of the network."""

    values: Tensor
    gradient: Tensor
    x0: Tensor
    mean: Tensor


@dataclass(frozen=True)
class State:
    """Particles at step i; rows are prompt-major, then image, then particle.

    A state computes its denoised prediction at most once, when first asked; `select` hands it to the survivors.

    Args:
        x: Latents at step i, [n, c, h, w].
        i: Step index, 0 .. T; T is the end of the chain.
        row: Index of each particle's prompt, int64 [n].
        origin: Which of its image's starting particles each particle descends from, int64 [n].
        context: What the states of the run share.
    """

    x: Tensor
    i: int
    row: Tensor
    origin: Tensor
    context: Context = field(repr=False)
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

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
            self._cache["images"] = self._decode(self.x0, self.context.diffusion.decode)
        return self._cache["images"]

    def scores(
        self, reward: Scorer, x0: Tensor | None = None, decode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n].

        Args:
            reward: Scores images.
            x0: Another prediction of the clean latents, [n, c, h, w], for a preview.
            decode: Another decoder, for a preview; neither preview is kept as the row's image.
        """
        prompts, ledger = self.prompts, self.context.ledger
        if x0 is None and decode is None:
            images = self.images
        else:
            images = self._decode(self.x0 if x0 is None else x0, decode or self.context.diffusion.decode)
        with ledger.timed("reward_seconds", self.x.device):
            scores = self.context.diffusion.chunker.map(reward.score, len(images), images, prompts)
        ledger.reward_calls += len(images)
        return scores

    def preview(self, guidance_scale: float) -> Tensor:
        """Returns x0 under another weight of classifier-free guidance, [n, c, h, w]; it is no prediction to go on from.

        Where the scale is the model's own it is the prediction; at the end of the chain it is x itself.

        Args:
            guidance_scale: At 1 or less the unconditional half of the network's rows is saved.
        """
        context, diffusion, n = self.context, self.context.diffusion, len(self.x)
        own = diffusion.guidance_scale
        if self.done or (own is not None and max(guidance_scale, 1.0) == max(own, 1.0)):
            return self.x0

        def preview(x: Tensor, row: Tensor) -> Tensor:
            return diffusion.preview(x, self.i, context.conditioning, row, guidance_scale)

        with context.ledger.timed("denoiser_seconds", self.x.device):
            x0 = diffusion.chunker.map(preview, n, self.x, self.row)
        context.ledger.denoiser_rows += n
        context.ledger.network_rows += n * diffusion.preview_network_rows(guidance_scale)
        return x0

    def flow(self) -> "State":
        """Returns the only child that there is without noise: a DDIM step with eta = 0.

        Raises:
            ValueError: At the end of the chain.
        """
        if self.done:
            raise ValueError("the chain has ended (i = T): there is nowhere to flow to")
        x = self.context.diffusion.flow(self.x, self.x0, self.i)
        return State(x, self.i + 1, self.row, self.origin, self.context)

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
            x = x + self.std * self.context.noise(len(x) // self.num_images).to(x)
        row, origin = self.row.repeat_interleave(m), self.origin.repeat_interleave(m)
        child = State(x, self.i + 1, row, origin, self.context)
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
        cache = {name: _pick(known, flat) for name, known in self._cache.items()}
        here = flat.to(self.row.device)
        return replace(self, x=self.x[flat], row=self.row[here], origin=self.origin[here], _cache=cache)

    def join(self, other: "State") -> "State":
        """Returns the rows of both states, at the same step, with every image's rows of `other` after its own.

        What only one of them knows is forgotten.
        """
        if self.i != other.i:
            raise ValueError(f"states must be at the same step to be joined, got steps {self.i} and {other.i}")

        def merge(first: Any, second: Any) -> Any:
            if not isinstance(first, Tensor):
                return type(first)._make(map(merge, first, second))
            groups = (first.unflatten(0, (self.num_images, -1)), second.unflatten(0, (self.num_images, -1)))
            return torch.cat(groups, 1).flatten(0, 1)

        cache = {name: merge(self._cache[name], other._cache[name]) for name in self._cache.keys() & other._cache}
        x, row, origin = (merge(getattr(self, name), getattr(other, name)) for name in ("x", "row", "origin"))
        return replace(self, x=x, row=row, origin=origin, _cache=cache)

    def replay(self, x: Tensor) -> "State":
        """Starts the same chain from other latents: every row of an image will receive the noise of this start.

        So the end of a row depends on its start alone, and equal starts have equal ends, however often this is asked.

        Args:
            x: Latents at i = 0, [images * k, c, h, w].

        Raises:
            ValueError: If this state is not at the start of the chain.
        """
        if self.i != 0:
            raise ValueError(f"only a start can be replayed, got a state at step {self.i}")
        k = len(x) // self.num_images
        row = self.row.view(self.num_images, -1)[:, :1].expand(-1, k).flatten()
        origin = torch.arange(k, device=row.device).repeat(self.num_images)
        return State(x, 0, row, origin, self.context.replay())

    def gradient(self, value: Callable[["State"], Tensor], through_denoiser: bool = True) -> tuple[Tensor, Tensor]:
        """Returns the values of the rows and the gradient of each with respect to its own latent.

        Evaluated once, with the prediction, which the next step then has; `select` hands all of it to the survivors.

        Args:
            value: Scores rows; it must be differentiable.
            through_denoiser: Differentiate through the network. Otherwise the gradient is taken at x0 and used as if
                x0 were x (a network evaluation without a backward pass).

        Returns:
            Values, float [n], and their gradient, [n, c, h, w].
        """
        key = (value, through_denoiser)
        if key not in self._cache:
            self._cache[key] = slope = self._differentiate(value, through_denoiser)
            self._cache["prediction"] = Denoised(slope.x0, slope.mean)
        slope = self._cache[key]
        return slope.values, slope.gradient

    def uniforms(self, k: int) -> Tensor:
        """Returns k uniform numbers in [0, 1) for each image from its own selection stream, float64 [images, k]."""
        return self.context.uniforms(k).to(self.x.device)

    def _decode(self, x0: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        with self.context.ledger.timed("decoder_seconds", self.x.device):
            images = self.context.diffusion.chunker.map(decode, len(x0), x0)
        self.context.ledger.decoded_images += len(x0)
        return images

    def _denoise(self) -> Denoised:
        context, diffusion, n = self.context, self.context.diffusion, len(self.x)

        def denoise(x: Tensor, row: Tensor) -> Denoised:
            return diffusion.denoise(x, self.i, context.conditioning, row)

        with context.ledger.timed("denoiser_seconds", self.x.device):
            denoised = diffusion.chunker.map(denoise, n, self.x, self.row)
        context.ledger.denoiser_rows += n
        context.ledger.network_rows += n * diffusion.network_rows_per_row
        return denoised

    def _differentiate(self, value: Callable[["State"], Tensor], through_denoiser: bool) -> _Slope:
        """Works on chunks, each with a graph of its own, so that memory is bounded by `chunk_size`."""
        if not through_denoiser:
            _ = self.prediction

        def differentiate(x: Tensor, row: Tensor, origin: Tensor, *known: Tensor) -> _Slope:
            with torch.enable_grad():
                part = State(x.detach().requires_grad_(through_denoiser), self.i, row, origin, self.context)
                if known:
                    part._cache["prediction"] = Denoised(known[0].detach().requires_grad_(), known[1])
                before = ledger.denoiser_rows
                values = value(part)
                rows = ledger.denoiser_rows - before  # of the network, between the latents and the values
                if not values.requires_grad:
                    raise UserError(
                        f"the value has no gradient at {'x' if through_denoiser else 'x0'}: it does not depend on it"
                    )
                (slope,) = torch.autograd.grad(values.sum(), part.x if through_denoiser else part.x0)
            ledger.gradient_rows += rows
            return _Slope(values.detach(), slope, *(tensor.detach() for tensor in part.prediction))

        ledger = self.context.ledger
        known = () if through_denoiser else tuple(self.prediction)
        chunker = self.context.diffusion.chunker
        return chunker.map(differentiate, len(self.x), self.x, self.row, self.origin, *known)


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
    noise = context.noise(num_particles).to(diffusion.device)
    row = torch.tensor([distinct[pair] for pair in pairs]).repeat_interleave(num_particles)
    origin = torch.arange(num_particles).repeat(len(prompts))
    return State(diffusion.initial(noise), 0, row.to(diffusion.device), origin.to(diffusion.device), context)


def _pick(known: Any, flat: Tensor) -> Any:
    """Takes rows of a tensor, or of every field of a named tuple of tensors."""
    return known[flat] if isinstance(known, Tensor) else type(known)._make(part[flat] for part in known)
