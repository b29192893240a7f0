"""Screening: a cheap value scores all candidates, an accurate one the best of them.

Law, if a sampler draws in proportion to exp(v / alpha): the exact values decide among the K of an image's M candidates
that the cheap value ranks highest. As M grows with K / M fixed, a candidate follows p(x' | x) exp(v(x') / alpha),
restricted to the share K / M of p(x' | x) with the highest cheap value. It is the law without screening only if K >= M
or in the steps before `start`.
"""

import math

import torch
from torch import Tensor

from svdd import require_at_least, require_numbers
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.state.state import State
from svdd.values.base import Value

__all__ = ["Screened"]


class Screened(Value):
    """The exact value of each image's best candidates by a cheap value; the others are never selected.

    At each step the cheap value scores an image's candidates, and the exact one scores the K best of them again. With
    at most K candidates, the cheap value is not evaluated. At the end of the chain every candidate is scored by the
    reward itself. Costs the cheap value for all candidates and the exact one for K; a kept row's prediction is reused.
    If both parts have the same preview and differ in their decoders, it is computed once: the exact value then costs K
    more decoded and scored images.

    Previews that reuse the parent's guidance rank early candidates at random: with `start`, the exact value scores all
    candidates of the early steps, which then should have fewer (`num_candidates: {0.4: 6, 1.0: 20}`).

    At alpha > 0 the selection is in proportion to exp(v / alpha) among these K candidates, not among all.

    Args:
        cheap: The value that ranks all candidates, such as `PosteriorMean` with a smaller decoder, or a learned value.
        exact: The value that decides among the best of them.
        keep: K, candidates of an image that the exact value scores, >= 1, and at least as many as a sampler keeps.
        start: Fraction of the chain from which candidates are screened, at least 0 and below 1; a step that leaves i is
            if i / T >= start.
    """

    keep: int

    def __init__(self, cheap: Value, exact: Value, keep: int = 3, start: float = 0.0) -> None:
        super().__init__()
        require_at_least(1, keep=keep)
        require_numbers(start=start)
        if not 0 <= start < 1:
            raise ValueError(f"start must be at least 0 and below 1, got {start}")
        for name, part in {"cheap": cheap, "exact": exact}.items():
            if part.keep is not None:
                raise ValueError(f"{name}: a {type(part).__name__} value cannot be part of another; give its own parts")
        reusing = [part.preview for part in (cheap, exact) if part.preview is not None and part.preview.reuses]
        if len(reusing) == 2 and reusing[0] != reusing[1]:
            raise ValueError(
                f"cheap and exact reuse the parent's evaluation differently: {reusing[0]} and {reusing[1]}"
            )
        self.cheap, self.exact, self.keep, self.start = cheap, exact, keep, start
        self.preview = reusing[0] if reusing else None

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Binds both values."""
        super().bind(reward, diffusion)
        self.cheap.bind(reward, diffusion)
        self.exact.bind(reward, diffusion)
        self.most_rows = self.cheap.most_rows + self.exact.most_rows

    def estimate(self, state: State) -> Tensor:
        """Returns the exact value of the best rows of every image, -inf for the others, float32 [n]."""
        images, n = state.num_images, len(state.x)
        first = math.ceil(round(self.start * state.num_steps, 9))  # rounded as stretches of a schedule are
        if n <= self.keep * images or state.i - 1 < first:
            return self.exact(state)
        ranked = self.cheap(state).view(images, -1).argsort(dim=1, descending=True, stable=True)
        best = ranked[:, : self.keep]
        values = self.exact(state.part(best)).view(images, -1)
        return torch.full_like(ranked, -math.inf, dtype=values.dtype).scatter(1, best, values).flatten()
