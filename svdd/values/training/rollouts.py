"""Rollouts of the pretrained chain, cached on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from svdd.diffusion.arithmetic import float32_default
from svdd.diffusion.base import Diffusion
from svdd.diffusion.preview import Preview
from svdd.runs.files import lock, os_errors_explained, write_atomically
from svdd.runs.rows import Prompt
from svdd.state.state import State

__all__ = ["RolloutCache", "draw_rollouts"]

ROLLOUTS_PER_SHARD = 64
_OPTION = "--data.cache"


@float32_default()
def draw_rollouts(
    diffusion: Diffusion,
    prompts: list[Prompt],
    seeds: list[int],
    steps: Sequence[int],
    read: Callable[[State], Tensor],
    preview: Preview | None = None,
) -> tuple[Tensor, State]:
    """Draws unguided chains; returns what `read` returns at the steps, [n, steps, ...] on the CPU, and their end.

    `preview` is that of the value, if any, which `read` evaluates.
    """
    negatives = [prompt.negative_prompt for prompt in prompts]
    state, kept = State.start(diffusion, [prompt.text for prompt in prompts], seeds, 1, negatives), []
    state.context.preview = preview
    while not state.done:
        if state.i in steps:
            kept.append(read(state).cpu())
        state = state.propose()
    return torch.stack(kept, 1), state


class RolloutCache:
    """The rollouts of one setting, in a folder of their own, independent of the reward.

    A shard is a safetensors file of up to 64 rollouts: the value's inputs at the kept steps, `x` [n, steps, ...], the
    final latents, `end` [n, ...], and a checksum of both. The head of a longer shard serves fewer rollouts.

    Args:
        folder: The folder of all caches.
        settings: Everything that the rollouts depend on, as plain numbers and strings.
        count: Number of rollouts.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], count: int) -> None:
        self._settings, text = settings, json.dumps(settings, sort_keys=True)
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.shards = [range(count)[k : k + ROLLOUTS_PER_SHARD] for k in range(0, count, ROLLOUTS_PER_SHARD)]
        self._files = [self.path / f"rollouts-{k:05d}.safetensors" for k in range(len(self.shards))]

    def missing(self) -> list[int]:
        """Returns the shards that must be drawn: absent, damaged or too short."""
        return [k for k in range(len(self.shards)) if not self._is_whole(k)]

    def claim(self, around: ExitStack) -> list[int]:
        """Returns the missing shards; if any, locks the cache until `around` closes, RunError if another run has."""
        if not self.missing():
            return []
        with os_errors_explained(self.path, _OPTION):
            around.callback(lock(self.path / ".lock", f"another run draws rollouts into {self.path}", _OPTION).release)
            for leftover in self.path.glob("rollouts-*.safetensors.tmp"):
                leftover.unlink()
        return self.missing()  # another run may have filled it in the meantime

    def write(self, shard: int, rollouts: dict[str, Tensor]) -> None:
        """Writes one shard, completely or not at all."""
        header = {"rollouts": json.dumps({"settings": self._settings, "sha256": _checksum(rollouts)})}
        with os_errors_explained(self.path, _OPTION):
            write_atomically(self._files[shard], save(rollouts, header))

    def load(self) -> list[dict[str, Tensor]]:
        """Returns the shards, without rollouts beyond the count; their tensors are memory-mapped."""
        shards = zip(map(load_file, self._files), self.shards, strict=True)
        return [{name: tensor[: len(rollouts)] for name, tensor in shard.items()} for shard, rollouts in shards]

    def _is_whole(self, shard: int) -> bool:
        if not self._files[shard].is_file():
            return False
        try:
            with safe_open(self._files[shard], "pt") as file:
                header = json.loads(file.metadata()["rollouts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            return header["sha256"] == _checksum(tensors) and len(tensors["end"]) >= len(self.shards[shard])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return False


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
