"""Decodes the rows of a state and scores their images, in chunks; a reward's threads begin with each chunk."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdd.state.context import Scorer
from svdd.state.scoring import Scoring, score, threads_of

if TYPE_CHECKING:
    from svdd.state.state import State

__all__ = ["decode_and_score", "decode_rows", "score_images"]

Decoder = Callable[[Tensor], Tensor]


def decode_rows(
    state: "State", x0: Tensor, decoder: Decoder, then: Callable[[Tensor, Tensor], object] | None = None
) -> Tensor:
    """Returns the images of latents, one for each row, and calls `then` with each chunk and the numbers of its rows."""

    def decode(x0: Tensor, *rows: Tensor) -> Tensor:
        images = decoder(x0)
        if then is not None and not context.diffusion.chunker.measures:
            then(images, *rows)
        return images

    context, known = state.context, (x0,) if then is None else (x0, torch.arange(len(x0), device="cpu"))
    with context.ledger.timed("decoder_seconds", x0.device):
        work = ("decoder", decoder)
        images = context.diffusion.chunker.map(decode, state.num_images, *known, parallel=True, work=work)
        own = decoder == context.diffusion.decode
        state.require_finite("decoder" if own else "preview decoder", x0, images)
    context.ledger.decoded_images += len(x0)
    return images


def score_images(state: "State", reward: Scorer, images: Tensor) -> Tensor:
    """Returns the score of each row's image, float32 [n]."""
    with state.context.ledger.timed("reward_seconds", images.device):
        return score(reward, state.context.diffusion.chunker, state.num_images, images, state.prompts)


def decode_and_score(state: "State", reward: Scorer, x0: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Returns the images of latents, one for each row, and their scores, float32 [n]."""
    whole = getattr(reward, "groupwise", False) or getattr(state.context.diffusion.chunker, "rehearses", False)
    if whole or not threads_of(reward):
        images = decode_rows(state, x0, decoder)
        return images, score_images(state, reward, images)
    with Scoring(reward, state.prompts) as scoring:
        images = decode_rows(state, x0, decoder, scoring.add)
        with state.context.ledger.timed("reward_seconds", x0.device):
            return images, scoring.result(x0.device)
