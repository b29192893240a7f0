"""Different numbers of candidates for the images of one batch; an image's candidates do not depend on the others."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svdd.state.context import Context
from svdd.state.recorder import recorded
from svdd.state.state import State

__all__ = ["proposals", "stack"]


def proposals(parents: State, counts: Tensor) -> Iterator[tuple[Tensor, State]]:
    """Draws counts[g] children of every row of image g; an image with count 0 costs nothing and draws no noise.

    Yields, for each distinct count, the images that have it, int64 [k], and their children, a batch of these images.
    """
    _ = parents.prediction, recorded(parents)  # once for all parts
    rows = torch.arange(len(parents.x), device=counts.device).view(parents.num_images, -1)
    for count in counts[counts > 0].unique().tolist():
        images = (counts == count).nonzero().flatten()
        part = parents.select(rows[images].view(1, -1), kl=0.0)
        yield images, replace(part, context=parents.context.of(images)).propose(count)


def stack(parts: Sequence[State], context: Context) -> State:
    """Concatenates the rows of all parts, and the cached results that every part has."""
    x, row, origin = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "row", "origin"))
    known = [name for name in parts[0]._cache if all(name in part._cache for part in parts)]
    cache = {name: torch.cat([part._cache[name] for part in parts]) for name in known}
    return State(x, parts[0].i, row, origin, context, cache)
