"""Calls of a reward on the rows of a batch."""

from collections.abc import Sequence

from torch import Tensor

from svdd.diffusion.chunking import Chunker
from svdd.state.context import Scorer

__all__ = ["score"]


def score(reward: Scorer, chunker: Chunker, groups: int, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns the reward of each image, float32 [n]; a groupwise one sees each of so many equal groups in one call."""
    whole = getattr(reward, "groupwise", False)
    groups = 1 if getattr(reward, "one_call", False) and not whole else groups
    return chunker.map(reward.score, groups, images, prompts, work=("reward", reward), whole=whole)
