"""Text states of prompts of unequal length, and other arithmetic that several families of flow models share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["dynamic_shift", "masked_mean", "pad_states", "trim_states"]


def pad_states(states: Tensor, mask: Tensor | None, length: int) -> dict[str, Tensor]:
    """Returns `states`, padded with zeros to [p, length, d], and `mask`, bool [p, length], true for real tokens.

    Args:
        states: Of each text's tokens, [p, tokens, d].
        mask: Which of them are real, [p, tokens], or None if all are.
        length: Tokens of the result, at least as many as there are.
    """
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    spare = length - states.shape[1]
    padded = torch.nn.functional.pad(states, (0, 0, 0, spare))
    return {"states": padded, "mask": torch.nn.functional.pad(mask.bool(), (0, spare))}


def trim_states(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns both up to the last real token of any row, and None for a mask without padding."""
    longest = int(mask.sum(1).max())
    states, mask = states[:, :longest], mask[:, :longest]
    return states, None if bool(mask.all()) else mask


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each text's states over its real tokens, [p, d]."""
    weights = mask.to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Returns `mu`, by which a scheduler shifts its noise levels: linear in the number of a picture's tokens."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return tokens * slope + (low - slope * least)
