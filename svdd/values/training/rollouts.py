"""Rollouts of the pretrained chain, cached on disk.

A cache folder holds shards of a fixed number of rollouts, each a safetensors file with the value's input at the kept
steps, `x` [n, steps, c, h, w], the final latents `end` [n, c, h, w], and a checksum of both. It does not depend on the
reward. A shard is written by one process under a temporary name and renamed; a missing, damaged or short one is drawn
again. A rollout depends only on its number, so the head of a longer shard can be used.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from svdd.diffusion.base import Diffusion
from svdd.runs.files import lock, os_errors_explained, write_atomically
from svdd.state.state import State

__all__ = ["RolloutCache", "draw_rollouts"]

ROLLOUTS_PER_SHARD = 64


def draw_rollouts(
    diffusion: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[int],
    read: Callable[[State], Tensor],
    negative_prompts: Sequence[str | None] | None = None,
) -> dict[str, Tensor]:
    """Draws unguided chains, as `Unguided` does, and keeps the inputs of a value.

    Args:
        diffusion: The chain.
        prompts: One per rollout.
        seeds: One per rollout.
        steps: The steps to keep, increasing, within 1 .. T - 1.
        read: Returns the value's input, `LearnedValue.read`.
        negative_prompts: One per rollout, or None for the model's default throughout.

    Returns:
        `x`, the inputs, [n, steps, ...], and `end`, the final latents [n, c, h, w]; on the CPU.
    """
    state, kept = State.start(diffusion, prompts, seeds, negative_prompts=negative_prompts), []
    while not state.done:
        if state.i in steps:
            kept.append(read(state).cpu())
        state = state.propose()
    return {"x": torch.stack(kept, 1), "end": state.x.cpu()}


class RolloutCache:
    """The rollouts of one setting, in a folder of their own.

    Args:
        folder: The folder of all caches.
        settings: Everything that the rollouts depend on, as plain numbers and strings.
        count: Number of rollouts.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], count: int) -> None:
        self._settings, text = settings, json.dumps(settings, sort_keys=True)
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        starts = range(0, count, ROLLOUTS_PER_SHARD)
        self.shards = [range(start, min(start + ROLLOUTS_PER_SHARD, count)) for start in starts]

    def missing(self) -> list[int]:
        """Returns the shards that must be drawn: absent, damaged or too short."""
        with os_errors_explained(self.path, "--data.cache"):
            return [k for k in range(len(self.shards)) if not self._is_whole(k)]

    @contextmanager
    def filling(self) -> Iterator[list[int]]:
        """Yields the missing shards, and locks the cache if there are any; for one process of a run.

        Raises:
            RunError: If another run draws into this cache, or it cannot be written.
        """
        if not self.missing():
            yield []
            return
        with os_errors_explained(self.path, "--data.cache"):
            self.path.mkdir(parents=True, exist_ok=True)
            held = f"another run draws rollouts into {self.path}"
            file_lock = lock(self.path / ".lock", held, option="--data.cache")
        try:
            for leftover in self.path.glob("*.tmp"):
                leftover.unlink()
            yield self.missing()  # another run may have filled it in the meantime
        finally:
            file_lock.release()

    def write(self, shard: int, rollouts: dict[str, Tensor]) -> None:
        """Writes one shard, completely or not at all."""
        rollouts = {name: tensor.contiguous() for name, tensor in rollouts.items()}
        header = {"rollouts": json.dumps({"settings": self._settings, "sha256": _checksum(rollouts)})}
        with os_errors_explained(self.path, "--data.cache"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(shard), save(rollouts, header))

    def load(self) -> list[dict[str, Tensor]]:
        """Returns the shards, without rollouts beyond the count; their tensors are memory-mapped."""
        shards = [(load_file(self._file(k)), len(rollouts)) for k, rollouts in enumerate(self.shards)]
        return [{name: tensor[:count] for name, tensor in shard.items()} for shard, count in shards]

    def _file(self, shard: int) -> Path:
        return self.path / f"rollouts-{shard:05d}.safetensors"

    def _is_whole(self, shard: int) -> bool:
        try:
            with safe_open(self._file(shard), "pt") as file:
                header = json.loads(file.metadata()["rollouts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return False
        return header["sha256"] == _checksum(tensors) and len(tensors["end"]) >= len(self.shards[shard])


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
