"""The data of `svdd fit`: rollouts, drawn once and cached, and the batches of states that a value learns from."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from svdd import UserError
from svdd.runs.prompts import PromptDataset
from svdd.values.training.rollouts import RolloutCache, draw_rollouts

__all__ = ["RolloutDataModule", "StateDataset"]

Batch = dict[str, Tensor]


class StateDataset(Dataset[Batch]):
    """Every kept state of some rollouts, with the reward that the rollout ended in.

    Args:
        shards: What `RolloutCache.load` returned.
        rollouts: Which rollouts, counted over all shards.
        steps: The kept steps, rising.
        rewards: The reward of every rollout of the cache, [rollouts].
        prompts: Index of every rollout's prompt, int64 [rollouts].
    """

    def __init__(
        self,
        shards: Sequence[dict[str, Tensor]],
        rollouts: Sequence[int],
        steps: Sequence[int],
        rewards: Tensor,
        prompts: Tensor,
    ) -> None:
        self.shards, self.rollouts, self.steps = shards, list(rollouts), list(steps)
        self.rewards, self.prompts = rewards, prompts
        self._shard_size = len(shards[0]["end"])

    def __len__(self) -> int:
        return len(self.rollouts) * len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        """Returns one state; see `__getitems__`."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns states as one batch.

        Returns:
            `x` and, one kept step later, `next_x`, each as it was read; `step` and `next_step`, int64 [b], where
            `next_step` -1 is the end of the chain, of which nothing is read; `reward` [b]; `prompt` int64 [b].
        """
        columns: dict[str, list[Any]] = {name: [] for name in ("x", "next_x", "step", "next_step", "rollout")}
        for index in indices:
            rollout, k = self.rollouts[index // len(self.steps)], index % len(self.steps)
            shard, row = self.shards[rollout // self._shard_size], rollout % self._shard_size
            last = k + 1 == len(self.steps)
            columns["x"].append(shard["x"][row, k])
            columns["next_x"].append(shard["x"][row, k if last else k + 1])
            columns["step"].append(self.steps[k])
            columns["next_step"].append(-1 if last else self.steps[k + 1])
            columns["rollout"].append(rollout)
        rollouts = torch.tensor(columns.pop("rollout"))
        batch = {name: torch.stack(column) for name, column in columns.items() if name.endswith("x")}
        batch |= {name: torch.tensor(columns[name]) for name in ("step", "next_step")}
        return batch | {"reward": self.rewards[rollouts], "prompt": self.prompts[rollouts]}

    def spread(self, num_inference_steps: int) -> Tensor:
        """Returns the standard deviation of the inputs at step i, [T]; of steps that were not kept, the nearest's."""
        own = torch.stack([
            torch.cat([shard["x"][:, k].float() for shard in self.shards]).std() for k in range(len(self.steps))
        ])  # fmt: skip
        steps = torch.tensor(self.steps)
        nearest = (torch.arange(num_inference_steps)[:, None] - steps).abs().argmin(1)
        return own[nearest]


class RolloutDataModule(L.LightningDataModule):
    """Draws rollouts of the module's pretrained chain, keeps them in a cache, and serves their states.

    Rollout k starts from prompt k modulo the number of prompts, with the seed `seed + k`. Processes draw different
    shards; an interrupted generation continues. The reward is computed anew each time, so that one cache serves many.

    Args:
        prompts: A list of prompts or a file, as in `svdd predict`, with its column `negative_prompt`, without `seed`.
        num_rollouts: How many chains to draw. A held-out share is never trained on.
        keep_every: Keep every so many steps of a chain, counted back from the last; 1 keeps all, which bootstrapping
            needs.
        validation: Share of the rollouts that is held out, above 0 and below 1.
        batch_size: States in a training batch.
        rollout_batch_size: Chains drawn, and ends scored, at once; no more than the 64 of a shard of the cache.
        seed: Seed of the first rollout.
        cache: Folder of the caches.
        prompt_column: Name of the column, or JSON key, that holds the prompt.
        limit: Use only the first prompts, at most this many.

    Raises:
        ValueError: If a number is out of range.
    """

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
        for name, number in (
            ("keep_every", keep_every),
            ("batch_size", batch_size),
            ("rollout_batch_size", rollout_batch_size),
        ):
            if number < 1:
                raise ValueError(f"{name} must be >= 1, got {number}")
        if num_rollouts < 4:
            raise ValueError(f"num_rollouts must be >= 4, some to train on and some to hold out, got {num_rollouts}")
        if not 0 < validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {validation}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.num_rollouts, self.keep_every, self.validation = num_rollouts, keep_every, validation
        self.batch_size, self.rollout_batch_size, self.seed, self.cache = batch_size, rollout_batch_size, seed, cache
        dataset = PromptDataset(prompts, prompt_column, limit)
        used = [dataset[k] for k in range(min(len(dataset), num_rollouts))]
        self.texts, self.negatives = [prompt.text for prompt in used], [prompt.negative_prompt for prompt in used]
        self.digest = dataset.digest
        dataset.close()
        self.training: StateDataset | None = None
        self.held_out: StateDataset | None = None

    def setup(self, stage: str) -> None:
        """Forgets what was made ready for an earlier training, whose model may have been another."""
        self.training = self.held_out = None

    def generate(self) -> None:
        """Draws what the cache lacks, computes the rewards, and hands the units to the value; every process calls it.

        Raises:
            UserError: If the module's value has nothing to learn, or cannot learn from these steps.
            RewardError: If the reward fails; the rollouts stay in the cache.
        """
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        diffusion, value = module.diffusion, module.learned_value
        steps = self._steps(diffusion.num_inference_steps)
        if value.loss.bootstrap and self.keep_every > 1:
            raise UserError(f"loss.bootstrap needs every step of the rollouts, got data.keep_every={self.keep_every}")
        cache = RolloutCache(
            Path(self.cache),
            {
                **diffusion.identity,
                "input": value.input,
                "prompts_sha256": self.digest,
                "seed": self.seed,
                "steps": steps,
                "dtype": str(diffusion.dtype),
            },
            self.num_rollouts,
        )
        self._fill(cache, module, steps)
        shards = cache.load()
        prompts = torch.arange(self.num_rollouts) % len(self.texts)
        rewards = self._rewards(shards, module)
        held_out = max(1, round(self.validation * self.num_rollouts))
        cut = self.num_rollouts - held_out
        self.training = StateDataset(shards, range(cut), steps, rewards, prompts)
        self.held_out = StateDataset(shards, range(cut, self.num_rollouts), steps, rewards, prompts)
        value.observe(rewards[:cut], self.training.spread(diffusion.num_inference_steps))
        module.learn_prompts(self.texts)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns shuffled batches of the training states."""
        if self.training is None:
            self.generate()
        assert self.training is not None
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.training, self.batch_size, shuffle=True, collate_fn=_as_is, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns batches of the held-out states."""
        if self.held_out is None:
            self.generate()
        assert self.held_out is not None
        return DataLoader(self.held_out, self.batch_size, collate_fn=_as_is)

    def _steps(self, num_inference_steps: int) -> list[int]:
        steps = list(range(num_inference_steps - 1, 0, -self.keep_every))[::-1]
        if not steps:
            raise UserError(
                f"num_inference_steps={num_inference_steps} has no step between noise and image to learn from"
            )
        return steps

    def _fill(self, cache: RolloutCache, module: Any, steps: Sequence[int]) -> None:
        """Draws what is missing, every process its share; rank 0 has looked, and holds the cache, for all."""
        trainer: Any = self.trainer
        with ExitStack() as around:
            missing: list[int] | UserError = []
            if trainer.is_global_zero:
                try:
                    missing = around.enter_context(cache.filling())
                except UserError as error:
                    missing = error
            missing = trainer.strategy.broadcast(missing)
            if isinstance(missing, UserError):  # every process ends, and none waits for rank 0
                raise missing
            if missing:
                rank_zero_info(f"drawing {len(missing)} of {len(cache.shards)} shards of rollouts into {cache.path}")
                self._draw(cache, missing, module, steps)
                trainer.strategy.barrier("svdd.values.training.rollouts.drawn")
                if trainer.is_global_zero:
                    cache.seal()
                trainer.strategy.barrier("svdd.values.training.rollouts.sealed")

    def _draw(self, cache: RolloutCache, missing: Sequence[int], module: Any, steps: Sequence[int]) -> None:
        trainer: Any = self.trainer
        watched = trainer.is_global_zero and sys.stderr.isatty()
        own = missing[trainer.global_rank :: trainer.world_size]
        with torch.no_grad():
            for shard in tqdm(own, desc="rollouts", disable=not (own and watched), leave=False):
                rollouts, size = cache.shards[shard], self.rollout_batch_size
                parts = [
                    draw_rollouts(
                        module.diffusion,
                        [self.texts[k % len(self.texts)] for k in part],
                        [self.seed + k for k in part],
                        steps,
                        module.learned_value.read,
                        [self.negatives[k % len(self.texts)] for k in part],
                    )
                    for part in (rollouts[start : start + size] for start in range(0, len(rollouts), size))
                ]
                cache.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _rewards(self, shards: Sequence[dict[str, Tensor]], module: Any) -> Tensor:
        """Scores the ends, every process its share of the shards, and returns all scores, [rollouts]."""
        trainer: Any = self.trainer
        diffusion, rewards, start = module.diffusion, torch.zeros(self.num_rollouts), 0

        def score(ends: Tensor, prompts: Sequence[str]) -> Tensor:
            return module.reward.score(diffusion.decode(ends.to(diffusion.device)), prompts).cpu()

        for k, shard in enumerate(shards):
            count = len(shard["end"])
            if k % trainer.world_size == trainer.global_rank:
                texts = [self.texts[r % len(self.texts)] for r in range(start, start + count)]
                with torch.no_grad():
                    for first in range(0, count, self.rollout_batch_size):
                        part = slice(first, first + self.rollout_batch_size)
                        ends = shard["end"][part]
                        scores = diffusion.chunker.map(score, len(ends), ends, texts[part])
                        rewards[start + first : start + first + len(scores)] = scores
            start += count
        return trainer.strategy.reduce(rewards.to(module.device), reduce_op="sum").cpu()


def _as_is(batch: Any) -> Any:
    return batch
