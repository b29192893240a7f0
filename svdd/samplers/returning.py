"""What a particle sampler returns of its weighted ends."""

import torch
from torch import Tensor

from svdd.samplers.base import Sampler
from svdd.samplers.toolbox.selection import draw, probabilities, top
from svdd.samplers.toolbox.weights import Weights
from svdd.state.state import State

__all__ = ["finish", "number_returned"]


def number_returned(returns: str, num_particles: int) -> int:
    """Returns the rows per image that `finish` leaves.

    Raises:
        ValueError: If `returns` is unknown.
    """
    if returns not in ("best", "drawn", "all"):
        raise ValueError(f"returns must be one of best, drawn, all, got {returns!r}")
    return num_particles if returns == "all" else 1


def finish(sampler: Sampler, returns: str, state: State, rewards: Tensor, weights: Weights, increment: Tensor) -> State:
    """Returns the best end by reward, one drawn by weight, or all with their weights in the trace.

    Args:
        sampler: Whose ends they are.
        returns: `best`, `drawn` or `all`.
        state: The end of the chain.
        rewards: [images, particles].
        weights: The final weights.
        increment: What the last potential adds to the estimate of log Z, [images].
    """
    images, particles = rewards.shape
    if returns == "best":
        index = top(rewards)
    elif returns == "drawn":
        index = draw(weights.log_w, state.uniforms(1))
    else:
        index = torch.arange(particles, device=rewards.device).expand(images, -1)
        state.context.trace.weights = probabilities(weights.log_w)
    return sampler.keep(state, index, rewards, weights.log_w, increment)
