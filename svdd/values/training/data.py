"""The data of `svdd fit`: rollouts, drawn once and cached, and batches of their states."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_convert
from tqdm import tqdm

from svdd import UserError, require_at_least, require_numbers
from svdd.runs.prompts import Prompt, PromptDataset
from svdd.values.training.fitting import ValueFitting
from svdd.values.training.rollouts import RolloutCache, draw_rollouts

__all__ = ["RolloutDataModule", "StateDataset"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StateDataset(Dataset[Batch]):
    """Every kept state of some rollouts, with the rollout's final reward."""

    shards: Sequence[Batch]  # what `RolloutCache.load` returned
    rollouts: range  # which rollouts, counted over all shards
    steps: Tensor  # the kept steps, increasing, int64 [steps]
    rewards: Tensor  # of the rollouts of all shards, [rollouts]
    prompts: Tensor  # index of each rollout's prompt, int64 [rollouts]

    def __len__(self) -> int:
        return len(self.rollouts) * len(self.steps)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a batch of states and those one kept step later; after the last step -1, whose `next_x` is void."""
        count, size = len(self.steps), len(self.shards[0]["end"])
        index = torch.tensor(indices)
        rollout, k = self.rollouts.start + index // count, index % count
        following = (k + 1).clamp(max=count - 1)
        chains = [self.shards[r // size]["x"][r % size] for r in rollout.tolist()]
        return {
            "x": torch.stack([chain[j] for chain, j in zip(chains, k, strict=True)]),
            "next_x": torch.stack([chain[j] for chain, j in zip(chains, following, strict=True)]),
            "step": self.steps[k],
            "next_step": torch.where(k + 1 < count, self.steps[following], -1),
            "reward": self.rewards[rollout],
            "prompt": self.prompts[rollout],
        }

    def spread(self, num_inference_steps: int) -> Tensor:
        """Returns the standard deviation of the inputs at step i, [T]; at other steps, that of the nearest."""
        inputs = ([shard["x"][:, k].float() for shard in self.shards] for k in range(len(self.steps)))
        own = torch.stack([torch.cat(parts).std() for parts in inputs])
        return own[(torch.arange(num_inference_steps)[:, None] - self.steps).abs().argmin(1)]


class RolloutDataModule(L.LightningDataModule):
    """Draws rollouts of the pretrained chain, caches them, and serves their states to `ValueFitting`.

    Rollout k starts from prompt k modulo the number of prompts, with the seed `seed + k`.

    Args:
        prompts: A list of prompts or a file, as in `svdd predict`, with its column `negative_prompt`, without `seed`.
        num_rollouts: Number of chains, >= 4. A held-out share is never trained on.
        keep_every: Keep every so many steps of a chain, counted back from the last. Bootstrapping needs 1, all steps.
        validation: Share of the rollouts that is held out, above 0 and below 1.
        batch_size: States in a training batch, >= 1.
        rollout_batch_size: Chains drawn, and final images scored, at once, >= 1; at most the 64 of a shard.
        seed: Seed of the first rollout, >= 0.
        cache: Folder of the caches.
        prompt_column: Name of the column, or JSON key, that holds the prompt.
        limit: Use at most this many prompts, the first ones.
    """

    trainer: Any

    def __init__(
        self,
        prompts: list[str] | str,
        num_rollouts: int = 1024,
        keep_every: int = 1,
        validation: float = 0.1,
        batch_size: int = 256,
        rollout_batch_size: int = 32,
        seed: int = 1_000_000,
        cache: str = "runs/rollouts",
        prompt_column: str = "prompt",
        limit: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(4, num_rollouts=num_rollouts)
        require_at_least(1, keep_every=keep_every, batch_size=batch_size, rollout_batch_size=rollout_batch_size)
        require_at_least(0, seed=seed)
        require_numbers(validation=validation)
        if not 0 < validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {validation}")
        self.num_rollouts, self.keep_every, self.validation = num_rollouts, keep_every, validation
        self.batch_size, self.rollout_batch_size, self.seed, self.cache = batch_size, rollout_batch_size, seed, cache
        self.dataset = PromptDataset(prompts, prompt_column, limit)
        self.prompts = [self.dataset[k] for k in range(min(len(self.dataset), num_rollouts))]

    def setup(self, stage: str) -> None:
        """Discards the states of an earlier training, whose model may have been another."""
        vars(self).pop("states", None)

    @cached_property
    def states(self) -> tuple[StateDataset, StateDataset]:
        """States to train on, and held-out ones: draws what the cache lacks, and sets the value's units."""
        module: ValueFitting = self.trainer.lightning_module
        diffusion, value = module.diffusion, module.value
        steps = list(range(diffusion.num_inference_steps - 1, 0, -self.keep_every))[::-1]
        if not steps:
            raise UserError("num_inference_steps=1 has no step between noise and image to learn from")
        if value.loss.bootstrap and self.keep_every > 1:
            raise UserError(f"loss.bootstrap needs every step of the rollouts, got data.keep_every={self.keep_every}")
        own = {"input": value.input, "prompts_sha256": self.dataset.digest, "seed": self.seed, "steps": steps}
        settings = diffusion.identity | own | {"dtype": str(diffusion.dtype)}
        count, cache = self.num_rollouts, RolloutCache(Path(self.cache), settings, self.num_rollouts)
        self._fill(cache, steps)
        shards, prompts = cache.load(), torch.arange(count) % len(self.prompts)
        contents = torch.tensor(steps), self._rewards(cache, shards), prompts
        cut = count - max(1, round(self.validation * count))
        training, held_out = (StateDataset(shards, part, *contents) for part in (range(cut), range(cut, count)))
        value.set_units(training.rewards[:cut], training.spread(diffusion.num_inference_steps))
        module.encode_prompts([prompt.text for prompt in self.prompts])
        return training, held_out

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns batches of this process's share of the training states, in an order that each epoch seeds anew."""
        states, trainer = self.states[0], self.trainer
        order: DistributedSampler[Batch] = DistributedSampler(
            states, trainer.world_size, trainer.global_rank, seed=self.seed
        )
        return self._loader(states, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns batches of the held-out states."""
        return self._loader(self.states[1])

    def _loader(self, states: StateDataset, order: DistributedSampler[Batch] | None = None) -> DataLoader[Batch]:
        """Returns batches; a loader without a generator of its own would draw from the one that dropout uses."""
        generator = torch.Generator()
        return DataLoader(states, self.batch_size, sampler=order, collate_fn=default_convert, generator=generator)

    def _parts(self, rollouts: range) -> Iterator[tuple[range, list[Prompt]]]:
        """Yields at most `rollout_batch_size` rollouts at once, with their prompts."""
        for start in range(0, len(rollouts), self.rollout_batch_size):
            part = rollouts[start : start + self.rollout_batch_size]
            yield part, [self.prompts[k % len(self.prompts)] for k in part]

    @torch.no_grad()
    def _fill(self, cache: RolloutCache, steps: Sequence[int]) -> None:
        """Draws the missing shards, every process its share; rank 0 finds them and holds the lock for all."""
        trainer, module = self.trainer, self.trainer.lightning_module
        read = attrgetter(module.value.input)
        with ExitStack() as around:
            missing = trainer.strategy.broadcast(_claim(cache, around) if trainer.is_global_zero else None)
            if isinstance(missing, str):
                raise UserError(missing)
            if not missing:
                return
            rank_zero_info(f"drawing {len(missing)} of {len(cache.shards)} shards of rollouts into {cache.path}")
            silent = None if trainer.is_global_zero else True  # None: unless stderr is a terminal
            own = missing[trainer.global_rank :: trainer.world_size]
            for shard in tqdm(own, desc="rollouts", disable=silent, leave=False):
                parts = [
                    draw_rollouts(module.diffusion, prompts, [self.seed + k for k in rollouts], steps, read)
                    for rollouts, prompts in self._parts(cache.shards[shard])
                ]
                x, end = torch.cat([inputs for inputs, _ in parts]), torch.cat([state.x.cpu() for _, state in parts])
                cache.write(shard, {"x": x, "end": end})
            trainer.strategy.barrier("svdd.values.training.rollouts.drawn")

    @torch.no_grad()
    def _rewards(self, cache: RolloutCache, shards: Sequence[Batch]) -> Tensor:
        """Scores the final images, every process its share of the shards, and returns all scores, [rollouts]."""
        trainer, module, rewards = self.trainer, self.trainer.lightning_module, torch.zeros(self.num_rollouts)

        def score(ends: Tensor, texts: Sequence[str]) -> Tensor:
            return module.reward.score(module.diffusion.decode(ends.to(module.device)), texts).cpu()

        for k in range(trainer.global_rank, len(shards), trainer.world_size):
            ends = shards[k]["end"].split(self.rollout_batch_size)
            for (rollouts, prompts), end in zip(self._parts(cache.shards[k]), ends, strict=True):
                texts = [prompt.text for prompt in prompts]
                rewards[rollouts.start : rollouts.stop] = module.diffusion.chunker.map(score, len(end), end, texts)
        return trainer.strategy.reduce(rewards.to(module.device), reduce_op="sum").cpu()


def _claim(cache: RolloutCache, around: ExitStack) -> list[int] | str:
    """Returns the missing shards, or the error that all processes raise."""
    try:
        return cache.claim(around)
    except UserError as error:
        return str(error)
