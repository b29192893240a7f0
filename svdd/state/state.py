"""A batch of particles at one step of the reverse chain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from svdd.diffusion.base import Denoised, Diffusion
from svdd.state.context import Context, Scorer
from svdd.state.gradient import differentiate
from svdd.state.rows import interleave, take

__all__ = ["Start", "State"]


@dataclass(frozen=True)
class State:
    """Particles at step i; rows are prompt-major, then image, then particle.

    A state computes its prediction on first use, once; `select` keeps it for the survivors.

    Args:
        x: Latents at step i, [n, c, h, w].
        i: Step index, 0 .. T; T is the end of the chain.
        row: Index of each particle's prompt, int64 [n].
        origin: Index of the image's starting particle from which each row descends, int64 [n].
        context: What all states of the batch share.
    """

    x: Tensor
    i: int
    row: Tensor
    origin: Tensor
    context: Context = field(repr=False)
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def start(
        diffusion: Diffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_particles: int = 1,
        negative_prompts: Sequence[str | None] | None = None,
    ) -> "State":
        """Returns the state at i = 0: pure noise, `num_particles` rows per image; see `Start`."""
        return Start(diffusion, prompts, seeds, negative_prompts)(num_particles)

    @property
    def num_images(self) -> int:
        """Images in the batch; each owns an equal group of consecutive rows."""
        return len(self.context.generators)

    @property
    def num_steps(self) -> int:
        """T, the number of steps of the chain."""
        return self.context.diffusion.num_inference_steps

    @property
    def done(self) -> bool:
        """Whether the chain has ended: i = T."""
        return self.i == self.num_steps

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
        """The denoiser's output at x, evaluated once; ValueError at the end of the chain."""
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
        """Returns x0 under another guidance scale, [n, c, h, w], as a preview that the next step does not use.

        At the model's own scale it is the prediction; at the end of the chain it is x itself.

        Args:
            guidance_scale: At 1 or less the network evaluates the conditional half only.
        """
        context, diffusion = self.context, self.context.diffusion
        own = diffusion.guidance_scale
        if self.done or (own is not None and max(guidance_scale, 1.0) == max(own, 1.0)):
            return self.x0

        def preview(x: Tensor, row: Tensor) -> Tensor:
            return diffusion.preview(x, self.i, context.conditioning, row, guidance_scale)

        return self._evaluate(preview, diffusion.preview_network_rows(guidance_scale))

    def flow(self) -> "State":
        """Returns each row's noise-free successor (a DDIM step with eta = 0); ValueError at the end of the chain."""
        if self.done:
            raise ValueError("the chain has ended (i = T): there is no further step")
        x = self.context.diffusion.flow(self.x, self.x0, self.i)
        return State(x, self.i + 1, self.row, self.origin, self.context)

    def propose(self, m: int = 1, mean: Tensor | None = None, kl: Tensor | None = None) -> "State":
        """Draws m children per row from the reverse kernel N(mean, std^2 I).

        Args:
            m: Children per row; they are consecutive (parent-major).
            mean: A shifted mean of the kernel, [n, c, h, w]; by default the model's own.
            kl: Divergence of the shifted kernel from the model's, in nats, [images], for `Trace.path_kl`.

        Raises:
            ValueError: If m is below 1, or the chain has ended.
        """
        if self.done:
            raise ValueError("the chain has ended (i = T): there is no kernel to draw from")
        if m < 1:
            raise ValueError(f"m must be >= 1, got {m}")
        if mean is None:
            mean = self.prediction.mean
        else:
            self.context.trace.diverge(kl)
        x = mean.repeat_interleave(m, 0) if m > 1 else mean
        if self.std > 0:
            x = x + self.std * self.context.noise(len(x) // self.num_images).to(x)
        self.context.report(self.i + 1)
        return State(x, self.i + 1, self.row.repeat_interleave(m), self.origin.repeat_interleave(m), self.context)

    def select(self, index: Tensor, kl: Tensor | float | None = None) -> "State":
        """Keeps some rows of every group, with the predictions and images already computed for them.

        Args:
            index: int64 [groups, k]; entry (g, j) counts within group g, the g-th of `groups` equal runs of rows.
            kl: Bound on the divergence that the selection adds, in nats, [images], for `Trace.path_kl`.

        Raises:
            ValueError: If `index` is no matrix, its groups do not divide the rows, or an index leaves its group.
        """
        if index.ndim != 2:
            raise ValueError(f"index must have shape [groups, k], got {list(index.shape)}")
        groups, n = index.shape[0], len(self.x)
        if groups < 1 or n % groups:
            raise ValueError(f"index has {groups} groups, which do not divide {n} rows evenly")
        size = n // groups
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"index must stay within its group of {size} rows, got {index.min()} .. {index.max()}")
        self.context.trace.diverge(kl)
        offsets = torch.arange(groups, device=index.device)[:, None] * size
        flat = (index + offsets).flatten().to(self.x.device)
        cache = {name: take(known, flat) for name, known in self._cache.items()}
        return replace(self, x=self.x[flat], row=self.row[flat], origin=self.origin[flat], _cache=cache)

    def join(self, other: "State") -> "State":
        """Returns the rows of both states, at the same step, with every image's rows of `other` after its own.

        Only predictions and images that both states hold are kept.
        """
        if self.i != other.i:
            raise ValueError(f"states must be at the same step to be joined, got steps {self.i} and {other.i}")
        images, shared = self.num_images, self._cache.keys() & other._cache
        cache = {name: interleave(self._cache[name], other._cache[name], images) for name in shared}
        parts = ((self.x, other.x), (self.row, other.row), (self.origin, other.origin))
        x, row, origin = (interleave(*pair, images) for pair in parts)
        return replace(self, x=x, row=row, origin=origin, _cache=cache)

    def replay(self, x: Tensor) -> "State":
        """Starts the same chain from other latents: every row of an image will receive the noise of this start.

        The end of a row then depends on its start alone, and equal starts have equal ends.

        Args:
            x: Latents at i = 0, [images * k, c, h, w]. This state must be at i = 0 too.
        """
        if self.i != 0:
            raise ValueError(f"only a start can be replayed, got a state at step {self.i}")
        if x is not self.x:
            self.context.trace.diverge(None)  # these latents need not follow the pretrained law
        k = len(x) // self.num_images
        origin = torch.arange(k, device=x.device).repeat(self.num_images)
        return State(x, 0, self.context.rows.repeat_interleave(k), origin, self.context.replay())

    def gradient(self, value: Callable[["State"], Tensor], through_denoiser: bool = True) -> tuple[Tensor, Tensor]:
        """Returns the value of each row and its gradient with respect to the row's own latent.

        Evaluated once, together with the prediction that the next step needs; `select` keeps both for the survivors.

        Args:
            value: A differentiable value.
            through_denoiser: Differentiate through the network. Otherwise the gradient at x0 is used in place of that
                at x, which saves the backward pass through the network.

        Returns:
            Values, float [n], and their gradient, [n, c, h, w].
        """
        key = (value, through_denoiser)
        if key not in self._cache:
            self._cache[key] = slope = differentiate(self, value, through_denoiser)
            self._cache["prediction"] = Denoised(slope.x0, slope.mean)
        return self._cache[key].values, self._cache[key].gradient

    def uniforms(self, k: int) -> Tensor:
        """Returns k uniform numbers in [0, 1) per image from its selection stream, float64 [images, k]."""
        return self.context.uniforms(k).to(self.x.device)

    def _decode(self, x0: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        with self.context.ledger.timed("decoder_seconds", self.x.device):
            images = self.context.diffusion.chunker.map(decode, len(x0), x0)
        self.context.ledger.decoded_images += len(x0)
        return images

    def _denoise(self) -> Denoised:
        context, diffusion = self.context, self.context.diffusion

        def denoise(x: Tensor, row: Tensor) -> Denoised:
            return diffusion.denoise(x, self.i, context.conditioning, row)

        return self._evaluate(denoise, diffusion.network_rows_per_row)

    def _evaluate(self, network: Callable[[Tensor, Tensor], Any], network_rows: int) -> Any:
        """Runs the network on chunks of the rows and enters the work into the ledger."""
        ledger, n = self.context.ledger, len(self.x)
        with ledger.timed("denoiser_seconds", self.x.device):
            result = self.context.diffusion.chunker.map(network, n, self.x, self.row)
        ledger.denoiser_rows += n
        ledger.network_rows += n * network_rows
        return result


class Start:
    """Begins the chain of a batch of images: `start(n)` returns n rows per image of pure noise, at i = 0.

    Prompts are encoded once, at construction. Each call continues the images' random streams: a second call returns
    new, independent rows, and numbers their `origin` on.

    Args:
        diffusion: The chain.
        prompts: One per image.
        seeds: One per image, 0 .. 2^63 - 1; they determine every random number of the image.
        negative_prompts: One per image, or None for the model's default throughout.

    Raises:
        ValueError: If there are no prompts, lengths differ or a seed is out of range.
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
        if n < 1:
            raise ValueError(f"a start needs at least 1 row per image, got {n}")
        context, images = self.context, len(self.context.generators)
        noise = context.noise(n).to(context.diffusion.device)
        origin = torch.arange(self._begun, self._begun + n, device=noise.device).repeat(images)
        self._begun += n
        return State(context.diffusion.initial(noise), 0, context.rows.repeat_interleave(n), origin, context)
