"""Rollouts of the pretrained chain, on disk: what a learned value is fitted to.

A cache folder holds `manifest.json` and shards of a fixed number of rollouts, each a safetensors file with what the
value reads at the kept steps, `x` [n, steps, c, h, w], and the final latents `end` [n, c, h, w]. It does not depend on
the reward. A shard is written by one process under a temporary name and renamed; one that is missing, torn, too short
or not as recorded is drawn again. A rollout depends on nothing but its number, so the head of a longer shard will do.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from svdd.diffusion.base import Diffusion
from svdd.runs.files import explained, lock, write_atomically
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
    """Draws unguided chains, exactly as `Unguided` does, and keeps what a value reads of them.

    Args:
        diffusion: The chain.
        prompts: One per rollout.
        seeds: One per rollout.
        steps: The steps to keep, rising, within 1 .. T - 1.
        read: What a value is shown of a state, `LearnedValue.read`.
        negative_prompts: One per rollout, or None for the model's default throughout.

    Returns:
        `x`, what was read, [n, steps, ...], and `end`, the final latents [n, c, h, w]; on the CPU.
    """
    state, kept = State.start(diffusion, prompts, seeds, negative_prompts=negative_prompts), []
    while not state.done:
        if state.i in steps:
            kept.append(read(state).cpu())
        state = state.propose()
    return {"x": torch.stack(kept, 1), "end": state.x.cpu()}


class RolloutCache:
    """A folder of rollouts for one setting; another setting has a folder of its own beside it.

    Args:
        folder: Where caches live.
        settings: Everything that the rollouts depend on, as plain numbers and strings.
        count: Number of rollouts.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], count: int) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings, self.count = settings, count
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self._manifest = self.path / "manifest.json"

    @property
    def shards(self) -> list[range]:
        """The rollouts of each shard."""
        return [
            range(start, min(start + ROLLOUTS_PER_SHARD, self.count))
            for start in range(0, self.count, ROLLOUTS_PER_SHARD)
        ]

    def missing(self) -> list[int]:
        """Returns the shards that must be drawn: absent, torn, too short or not as recorded."""
        with explained(self.path, "--data.cache"):
            recorded = self._recorded()
            return [k for k in range(len(self.shards)) if not self._is_whole(k, recorded.get(self._file(k).name))]

    @contextmanager
    def filling(self) -> Iterator[list[int]]:
        """Hands out the missing shards, and keeps other runs from drawing them meanwhile; for one process of a run.

        Where nothing is missing the cache is only read.

        Raises:
            RunError: If another run draws into this cache, or it cannot be written.
        """
        missing = self.missing()
        if not missing:
            yield []
            return
        with explained(self.path, "--data.cache"):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = lock(
                self.path / ".lock", f"another run draws rollouts into {self.path}", option="--data.cache"
            )
        try:
            yield self.missing()  # it may have been filled just before
        finally:
            os.close(descriptor)

    def write(self, shard: int, rollouts: dict[str, Tensor]) -> None:
        """Writes one shard, whole or not at all."""
        with explained(self.path, "--data.cache"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(shard), save({k: tensor.contiguous() for k, tensor in rollouts.items()}))

    def seal(self) -> None:
        """Records the settings and the checksum of every shard; for one process, when all are written, in `filling`."""
        with explained(self.path, "--data.cache"):
            for leftover in self.path.glob("*.tmp"):
                leftover.unlink()
            sums = self._recorded() | {self._file(k).name: self._checksum(k) for k in range(len(self.shards))}
            text = json.dumps({"settings": self.settings, "sha256": sums}, indent=2)
            write_atomically(self._manifest, text.encode() + b"\n")

    def load(self) -> list[dict[str, Tensor]]:
        """Returns the shards, without what is beyond the count; their tensors lie in mapped files, not in memory."""
        return [
            {name: tensor[: len(rollouts)] for name, tensor in load_file(self._file(k)).items()}
            for k, rollouts in enumerate(self.shards)
        ]

    def _file(self, shard: int) -> Path:
        return self.path / f"rollouts-{shard:05d}.safetensors"

    def _checksum(self, shard: int) -> str:
        return hashlib.sha256(self._file(shard).read_bytes()).hexdigest()

    def _recorded(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._manifest.read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _is_whole(self, shard: int, recorded: str | None) -> bool:
        try:
            with safe_open(self._file(shard), "pt") as file:
                length = file.get_slice("end").get_shape()[0]
            return length >= len(self.shards[shard]) and recorded in (None, self._checksum(shard))
        except (OSError, SafetensorError):
            return False
