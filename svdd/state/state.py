"""A batch of particles at one step of the reverse chain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.preview import Preview
from svdd.state.context import Context, Scorer
from svdd.state.decoding import decode_and_score, decode_rows, score_images
from svdd.state.gradient import differentiate
from svdd.state.index import within
from svdd.state.recorder import descent, recorded

__all__ = ["State"]

_RECORDED = "recorded"  # marks, in a state's cache, what previews of its children reuse
_ENDED = "the chain has ended (i = T): there is no further step, and x0 is x"


@dataclass(frozen=True)
class State:
    """Particles at step i; rows are prompt-major, then image, then particle.

    A state computes its prediction on first use, once; `select` keeps it for the survivors.
    """

    x: Tensor  # latents at step i, [n, *latent_shape]
    i: int  # step index, 0 .. T; T is the end of the chain
    row: Tensor  # index of each particle's prompt, int64 [n]
    origin: Tensor  # index of the image's starting particle from which each row descends, int64 [n]
    context: Context = field(repr=False)  # what all states of the batch share
    _cache: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)  # one entry per row in each
    # What evaluations of the parents recorded for previews, one entry per parent in each, and each row's parent, [n].
    _parents: tuple[dict[str, Tensor], Tensor] | None = field(default=None, repr=False, compare=False)
    _parts: list[tuple[Tensor, "State"]] = field(default_factory=list, repr=False, compare=False)  # see `part`

    @staticmethod
    def start(
        diffusion: Diffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_particles: int = 1,
        negative_prompts: Sequence[str | None] | None = None,
    ) -> "State":
        """Returns the state at i = 0: pure noise, `num_particles` rows per image; see `Start`."""
        return State.begin(Context.encode(diffusion, prompts, seeds, negative_prompts), num_particles)

    @staticmethod
    def begin(context: Context, n: int, begun: int = 0) -> "State":
        """Draws n >= 1 rows of pure noise per image, after `begun` earlier ones."""
        if n < 1:
            raise ValueError(f"a start needs at least 1 row per image, got {n}")
        noise = context.noise(n).to(context.diffusion.device)
        origin = torch.arange(begun, begun + n, device=noise.device).repeat(len(context.generators))
        return State(context.diffusion.initial(noise), 0, context.rows.repeat_interleave(n), origin, context)

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
        texts = self.context.texts  # to read `row` would wait for the device
        return [text for text in texts for _ in range(len(self.x) // len(texts))]

    @property
    def prediction(self) -> Denoised:
        """The denoiser's output at x, evaluated once; ValueError at the end of the chain."""
        if self.done:
            raise ValueError(_ENDED)
        if "x0" not in self._cache:
            diffusion, preview = self.context.diffusion, self.context.preview
            rows = diffusion.network_rows(diffusion.guidance_scale, self.i)
            if preview is not None and preview.reuses:
                found = self._evaluate(partial(diffusion.record, preview=preview), rows)
                self._cache.update(
                    {name if name in Denoised._fields else (_RECORDED, name): found[name] for name in found}
                )
            else:
                self._cache.update(self._evaluate(diffusion.denoise, rows)._asdict())
        return Denoised(self._cache["x0"], self._cache["mean"])

    @property
    def x0(self) -> Tensor:
        """Posterior mean E[x_0 | x_i], [n, *latent_shape]; at the end it is x itself."""
        return self.x if self.done else self.prediction.x0

    @property
    def images(self) -> Tensor:
        """The decoded x0, float32 [n, 3, H, W] in [0, 1]; decoded once."""
        if "images" not in self._cache:
            self._cache["images"] = decode_rows(self, self.x0, self.context.diffusion.decode)
            self.context.finiteness.settle()
        return self._cache["images"]

    def scores(
        self, reward: Scorer, x0: Tensor | None = None, decode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]; a preview has another x0 or another decoder."""
        context, own, known = self.context, x0 is None and decode is None, ("scores", reward)
        if own and known in self._cache:
            return self._cache[known]
        with context.finiteness.first():  # the network or the decoder may have failed before the reward
            if own and "images" in self._cache:
                scores = score_images(self, reward, self.images)
            else:
                latents, decoder = self.x0 if x0 is None else x0, decode or context.diffusion.decode
                images, scores = decode_and_score(self, reward, latents, decoder)
                self._cache.update({"images": images} if own else {})
        context.ledger.reward_calls += len(scores)
        if own and not getattr(reward, "groupwise", False):  # in another group, a row has another score
            self._cache[known] = scores
        return scores

    def preview(self, preview: Preview) -> Tensor:
        """Returns a cheaper prediction of x0, [n, *latent_shape]; x0 itself if there is nothing to save or to reuse."""
        diffusion, known = self.context.diffusion, ("preview", preview)
        if self.done or not diffusion.has_preview(preview, self.i) or (preview.reuses and self._parents is None):
            return self.x0
        if known in self._cache:
            return self._cache[known]
        recorded, parents = (self._parents if preview.reuses else None) or ({}, self.row)

        def evaluate(x: Tensor, parent: Tensor, i: int, conditioning: Any, row: Tensor) -> Tensor:
            reused = {name: kept[parent] for name, kept in recorded.items()}
            return diffusion.preview(x, i, conditioning, row, preview, reused)

        self._cache[known] = self._evaluate(evaluate, diffusion.preview_rows(preview, self.i), parents)
        return self._cache[known]

    def flow(self) -> "State":
        """Returns each row's noise-free successor (a DDIM step with eta = 0); ValueError at the end of the chain."""
        x = self.context.diffusion.flow(self.x, self.prediction.x0, self.i)
        return State(x, self.i + 1, self.row, self.origin, self.context)

    def propose(self, m: int = 1, mean: Tensor | None = None, kl: Tensor | None = None) -> "State":
        """Draws m >= 1 children per row from the reverse kernel N(mean, std^2 I); a row's children are consecutive.

        If the chain has inner steps, each child costs `inner_steps` - 1 denoiser rows in a step with noise.

        A sampler may shift the mean, [n, *latent_shape]. Then `kl` is the divergence of the shifted kernel from the
        model's, in nats, [images]; None if it is unknown.
        """
        if m < 1:
            raise ValueError(f"m must be >= 1, got {m}")
        if self.done:
            raise ValueError(_ENDED)
        diffusion, shifted, own = self.context.diffusion, mean is not None, recorded(self)
        if shifted:
            self.context.trace.diverge(kl)
        x = (self.prediction.mean if mean is None else mean).repeat_interleave(m, 0)
        row, origin = self.row.repeat_interleave(m), self.origin.repeat_interleave(m)
        if self.std > 0:
            noise = self.context.noise(len(x) // self.num_images).to(x)
            if diffusion.inner_steps == 1:
                x = x + self.std * noise
            elif shifted:
                raise UserError("a step with inner_steps above 1 is not Gaussian, and its mean cannot be shifted")
            else:
                copies = State(self.x.repeat_interleave(m, 0), self.i, row, origin, self.context)
                known, times = (self.x0.repeat_interleave(m, 0), noise), diffusion.inner_steps - 1
                rows = diffusion.network_rows(diffusion.guidance_scale, self.i)
                x = copies._evaluate(diffusion.draw, rows, *known, times=times)
        self.context.report(self.i + 1)
        reused = {key[1]: known for key, known in self._cache.items() if key[0] == _RECORDED}
        parents = reused, torch.arange(len(self.x), device=x.device).repeat_interleave(m)
        return State(x, self.i + 1, row, origin, self.context, descent(own, m), parents if reused else None)

    def select(self, index: Tensor, kl: Tensor | float | None = None) -> "State":
        """Keeps some rows of every group, with the predictions and images already computed for them.

        Entry (g, j) of `index`, int64 [groups, k], counts within the g-th of `groups` equal runs of rows. `kl` bounds
        the divergence that the selection adds, in nats, [images]; None if it is unknown.
        """
        index, size = within(index, self.row, self.context.finiteness)
        self.context.trace.diverge(kl)
        flat = (index + torch.arange(len(index), device=index.device)[:, None] * size).flatten()
        cache = {name: known[flat] for name, known in self._cache.items()}
        for places, part in self._parts:
            if bool((places[flat] >= 0).all()):  # waits for the device, once for each `part`
                cache |= {name: known[places[flat]] for name, known in part._cache.items()}
        parents = None if self._parents is None else (self._parents[0], self._parents[1][flat])
        return State(self.x[flat], self.i, self.row[flat], self.origin[flat], self.context, cache, parents)

    def part(self, index: Tensor) -> "State":
        """Returns distinct rows of every group as `select` does; what will be computed for them is kept for them."""
        index, _ = within(index, self.row, self.context.finiteness)
        part, order = self.select(index, kl=0.0), torch.arange(index.numel(), device=index.device).view_as(index)
        places = torch.full_like(self.row, -1).view(len(index), -1).scatter(1, index, order)
        self._parts.append((places.flatten(), part))
        return part

    def join(self, other: "State") -> "State":
        """Returns the rows of both states, at the same step, with every image's rows of `other` after its own."""
        if self.i != other.i:
            raise ValueError(f"states must be at the same step to be joined, got steps {self.i} and {other.i}")

        def joined(*parts: Tensor) -> Tensor:
            return torch.cat([part.unflatten(0, (self.num_images, -1)) for part in parts], 1).flatten(0, 1)

        x, row, origin = joined(self.x, other.x), joined(self.row, other.row), joined(self.origin, other.origin)
        cache = {name: joined(known, other._cache[name]) for name, known in self._cache.items() if name in other._cache}
        return State(x, self.i, row, origin, self.context, cache)

    def replay(self, x: Tensor) -> "State":
        """Starts the same chain from other latents x at i = 0, [images * k, *latent_shape].

        Every row of an image will receive the same noise, so the end of a row depends on its start alone.
        """
        if self.i != 0:
            help = "use another sampler inside Refinement"
            raise UserError(f"only a start at i = 0 can be replayed, got a state at step {self.i}; {help}")
        if x is not self.x:
            self.context.trace.diverge(None)  # these latents need not follow the pretrained law
        k = len(x) // self.num_images
        origin = torch.arange(k, device=x.device).repeat(self.num_images)
        return State(x, 0, self.context.rows.repeat_interleave(k), origin, self.context.replay())

    def gradient(self, value: Callable[["State"], Tensor], through_denoiser: bool = True) -> tuple[Tensor, Tensor]:
        """Returns the value of each row, float [n], and its gradient at the row's own latent, [n, *latent_shape].

        Evaluated once, together with the prediction that the next step needs; `select` keeps both for the survivors.
        Without `through_denoiser`, the gradient at x0 is used in place of that at x, which saves the backward pass
        through the network.
        """
        values, slope = ("values", value, through_denoiser), ("gradient", value, through_denoiser)
        if values not in self._cache:
            known, diffusion = () if through_denoiser else self.prediction, self.context.diffusion

            def differentiated(x: Tensor, texts: list[str], row: Tensor, origin: Tensor, *known: Tensor) -> Any:
                leaf = (known[0] if known else x).detach().requires_grad_()
                cache = {"x0": leaf, "mean": known[1]} if known else {}
                context = replace(self.context, texts=texts)
                part = State(x.detach() if known else leaf, self.i, row, origin, context, cache)
                return differentiate(value, part, leaf)

            rows = self.x, self.prompts, self.row, self.origin, *known
            steps = min(self.num_steps - self.i, getattr(value, "most_rows", 1))  # that a value looks ahead
            work = ("gradient", value, diffusion.network_rows(diffusion.guidance_scale, self.i), steps)
            # In chunks, which bounds the memory of the graph.
            found = diffusion.chunker.map(differentiated, self.num_images, *rows, work=work)
            self.require_finite("value's gradient", self.x, found["gradient"])
            self._cache.update({values: found.pop("values"), slope: found.pop("gradient")}, **found)
        return self._cache[values], self._cache[slope]

    def uniforms(self, k: int) -> Tensor:
        """Returns k uniform numbers in [0, 1) per image from its selection stream, float64 [images, k]."""
        return self.context.uniforms(k).to(self.x.device, non_blocking=True)

    def require_finite(self, part: str, source: Tensor, *found: Tensor) -> None:
        """Raises NotFinite, as `Finiteness` does, with the step and the first failing row's prompt."""
        where = f" at step {self.i} of {self.num_steps}"
        self.context.finiteness.require(part, source, *found, where=where, prompt=self.prompts.__getitem__)

    def _evaluate(self, network: Callable[..., Any], rows: float, *known: Tensor, times: int = 1) -> Any:
        """Runs the network on chunks of the rows, `times` times on each, and enters the work into the ledger.

        `rows` are the network-row equivalents of one evaluation of one row.
        """
        context, ledger, n = self.context, self.context.ledger, len(self.x) * times

        def evaluate(row: Tensor, x: Tensor, *known: Tensor) -> Any:
            return network(x, *known, self.i, context.conditioning, row)

        work = ("network", context.diffusion, getattr(network, "func", network).__qualname__, rows)
        with ledger.timed("denoiser_seconds", self.x.device):
            parts = (self.row, self.x, *known)
            result = context.diffusion.chunker.map(evaluate, self.num_images, *parts, parallel=True, work=work)
            found = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
            self.require_finite("denoiser", self.x, *found)
        ledger.denoiser_rows += n
        ledger.network_rows += n * rows
        return result
