"""The data of `svdd fit`: rollouts, drawn once and cached, and batches of their states."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from svdd.rewards.columns import columns_of
from svdd.runs.prompts import Prompt, PromptDataset
from svdd.values.training.fitting import ValueFitting
from svdd.values.training.rollouts import RolloutCache, draw_rollouts

__all__ = ["RolloutDataModule", "StateDataset"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StateDataset(Dataset[Batch]):
    """Every kept state of some rollouts, with the rollout's final reward in units of the rewards' spread.

    With rewards for other prompts, every state appears twice: with its own prompt, and with one of the others.
    """

    shards: Sequence[Batch]  # what `RolloutCache.load` returned
    rollouts: range  # which rollouts, counted over all shards
    steps: Tensor  # the kept steps, increasing, int64 [steps]
    rewards: Tensor  # of the rollouts of all shards, for the own prompt and others, [rollouts, 1 + others]
    prompts: Tensor  # the indices of these prompts, int64 [rollouts, 1 + others]

    def __len__(self) -> int:
        return len(self.rollouts) * len(self.steps) * min(2, self.prompts.shape[1])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a batch of states and those one kept step later; after the last step -1, whose `next_x` is void."""
        count, size = len(self.steps), len(self.shards[0]["end"])
        index, whole = torch.tensor(indices), len(self.rollouts) * count
        rollout, k = self.rollouts.start + index % whole // count, index % count
        column = index // whole * (1 + (rollout + k) % max(1, self.prompts.shape[1] - 1))
        following = (k + 1).clamp(max=count - 1)
        chains = [self.shards[r // size]["x"][r % size] for r in rollout.tolist()]
        return {
            "x": torch.stack([chain[j] for chain, j in zip(chains, k, strict=True)]),
            "next_x": torch.stack([chain[j] for chain, j in zip(chains, following, strict=True)]),
            "step": self.steps[k],
            "next_step": torch.where(k + 1 < count, self.steps[following], -1),
            "reward": self.rewards[rollout, column],
            "prompt": self.prompts[rollout, column],
            "unit": torch.where(column > 0, self.unit, 1.0),
        }

    @cached_property
    def unit(self) -> Tensor:
        """Returns the spread of the rewards for the own prompts, in units of that for the others; 1 without any."""
        own, others = self.rewards[self.rollouts, :1], self.rewards[self.rollouts, 1:]
        return own.std() / others.std() if others.numel() and others.std() > 0 else torch.tensor(1.0)

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
        other_prompts: Score each final image for this many other prompts too, and train on each state a second time
            with one of them: for rewards that compare image and prompt, which one prompt per image teaches badly.
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
        other_prompts: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(4, num_rollouts=num_rollouts)
        require_at_least(1, keep_every=keep_every, batch_size=batch_size, rollout_batch_size=rollout_batch_size)
        require_at_least(0, seed=seed, other_prompts=other_prompts)
        require_numbers(validation=validation)
        if not 0 < validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {validation}")
        self.num_rollouts, self.keep_every, self.validation = num_rollouts, keep_every, validation
        self.batch_size, self.rollout_batch_size, self.seed, self.cache = batch_size, rollout_batch_size, seed, cache
        self.other_prompts = other_prompts
        self.dataset = PromptDataset(prompts, prompt_column, limit)
        self.prompts = [self.dataset[k] for k in range(min(len(self.dataset), num_rollouts))]
        if other_prompts and len(self.prompts) < 2:
            raise UserError(f"other_prompts={other_prompts} needs at least two prompts, got {len(self.prompts)}")

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
        columns_of(module.reward).check(self.prompts, self.dataset.place)
        count, cache = self.num_rollouts, RolloutCache(Path(self.cache), settings, self.num_rollouts)
        self._fill(cache, steps)
        shards, prompts = cache.load(), self._scored_prompts()
        rewards, kept = self._rewards(cache, shards, prompts), torch.tensor(steps)
        cut = count - max(1, round(self.validation * count))
        training = StateDataset(shards, range(cut), kept, rewards, prompts)
        value.set_units(rewards[:cut, 0], training.spread(diffusion.num_inference_steps))
        rewards = (rewards - value.mean.cpu()) / value.std.cpu()  # before the Trainer rounds them to half precision
        training = replace(training, rewards=rewards)
        held_out = StateDataset(shards, range(cut, count), kept, rewards[:, :1], prompts[:, :1])
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

    def _scored_prompts(self) -> Tensor:
        """Returns the indices of the prompts that each rollout is scored for, its own first, [rollouts, 1 + others]."""
        own, count = torch.arange(self.num_rollouts)[:, None] % len(self.prompts), len(self.prompts)
        if not self.other_prompts:
            return own
        generator = torch.Generator().manual_seed(self.seed)
        shift = torch.randint(1, count, (self.num_rollouts, self.other_prompts), generator=generator)
        return torch.cat([own, (own + shift) % count], 1)

    @torch.no_grad()
    def _rewards(self, cache: RolloutCache, shards: Sequence[Batch], prompts: Tensor) -> Tensor:
        """Scores the final images, every process its share of the shards, and returns all scores, as `prompts`."""
        trainer, module = self.trainer, self.trainer.lightning_module
        rewards, read = torch.zeros(prompts.shape), columns_of(module.reward)

        def score(ends: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
            images = module.diffusion.decode(ends)
            columns = [module.reward.score(images, list(column)) for column in zip(*texts, strict=True)]
            return torch.stack(columns, 1).cpu()

        for k in range(trainer.global_rank, len(shards), trainer.world_size):
            rollouts = cache.shards[k]
            for start, end in zip(
                rollouts[:: self.rollout_batch_size], shards[k]["end"].split(self.rollout_batch_size), strict=True
            ):
                part = slice(start, start + len(end))
                texts = [[read.text(self.prompts[p]) for p in row] for row in prompts[part].tolist()]
                rewards[part] = module.diffusion.chunker.map(score, len(end), end.to(module.device), texts)
        return trainer.strategy.reduce(rewards.to(module.device), reduce_op="sum").cpu()


def _claim(cache: RolloutCache, around: ExitStack) -> list[int] | str:
    """Returns the missing shards, or the error that all processes raise."""
    try:
        return cache.claim(around)
    except UserError as error:
        return str(error)
