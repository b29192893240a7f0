"""Training of a learned value."""

import math
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from svdd import UserError
from svdd.assets.content import digest, sources
from svdd.diffusion.auto import AutoDiffusion
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward, sparing_rewards
from svdd.runs.files import OtherRun
from svdd.values.latent_conv import LatentConvValue
from svdd.values.learned import LearnedValue

__all__ = ["ValueFitting"]

_PROMPTS_PER_BLOCK = 64


class ValueFitting(L.LightningModule):
    """Trains a value on batches of `RolloutDataModule`; the diffusion model and the reward are frozen.

    Args:
        reward: The reward that the value predicts.
        diffusion: The pretrained model; by default the one that ships with svdd.
        value: The value to train; by default `LatentConvValue`.
    """

    def __init__(self, reward: Reward, diffusion: Diffusion | None = None, value: LearnedValue | None = None) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds the value alone, and `on_load_checkpoint` checks it
        self.reward, self.diffusion, self.value = reward, diffusion or AutoDiffusion(), value or LatentConvValue()
        self.value.bind(reward, self.diffusion)
        reward.load()
        for frozen in (reward, self.diffusion):
            frozen.eval().requires_grad_(False)  # DDP would wait for these gradients
        self._prompt_features: Tensor | None = None
        self._fingerprints: dict[str, str] = {}
        self._held_out: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Takes the digests of what rollouts and scores depend on, before a precision converts the weights."""
        found = {f"diffusion.{name}": content for name, content in self.diffusion.fingerprints().items()}
        code = sources(self.diffusion, self.reward, self.value).items()
        found |= {f"the code of {name}": content for name, content in code}
        self._fingerprints = found | {f"reward {self.reward.name}": digest(self.reward)}

    @torch.no_grad()
    def encode_prompts(self, texts: list[str]) -> None:
        """Keeps the features of the prompts, which batches refer to by index; encodes them in blocks."""
        blocks = [texts[k : k + _PROMPTS_PER_BLOCK] for k in range(0, len(texts), _PROMPTS_PER_BLOCK)]
        encoded = ((self.diffusion.encode(block, [None] * len(block)), block) for block in blocks)
        found = (self.value.prompt_features(self.diffusion, *each) for each in encoded)
        parts = [part for part in found if part is not None]
        self._prompt_features = torch.cat(parts) if parts else None

    def on_train_epoch_start(self) -> None:
        """Seeds the global generator, from which dropout draws, by epoch and process: a continued training repeats."""
        epochs, trainer = int(os.environ.get("PL_GLOBAL_SEED", "0")) * 1_000_000 + self.current_epoch, self.trainer
        torch.manual_seed(epochs * trainer.world_size + trainer.global_rank)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch of states, in units of the rewards' variance."""
        loss = self._loss(batch, self.value.loss.bootstrap)[0]
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the loss of held-out states against the rewards: against itself an uninformed value would score best."""
        loss, predictions, rewards = self._loss(batch, bootstrap=False)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self._held_out.append((batch["step"].cpu(), predictions.float().cpu(), rewards.float().cpu()))

    def on_validation_epoch_end(self) -> None:
        """Logs the rank correlation of prediction and reward, averaged over the steps (of this process's states)."""
        step, predictions, rewards = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        self._held_out = []
        here = [step == i for i in step.unique()]
        correlations = [spearman_corrcoef(predictions[rows], rewards[rows]) for rows in here if int(rows.sum()) > 1]
        mean = torch.stack(correlations).nanmean() if correlations else torch.tensor(torch.nan)
        if self.trainer.world_size > 1 or mean.isfinite():  # all of several processes must take part
            self.log("val_spearman", mean.to(self.device), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW on the value's own parameters, warmed up, then cosine to 0; UserError if the length is unknown."""
        own = [parameter for parameter in self.value.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=self.value.learning_rate, weight_decay=1e-4)
        if math.isinf(total := self.trainer.estimated_stepping_batches):
            raise UserError(
                "the learning rate falls to 0 over the training: got neither trainer.max_epochs nor trainer.max_steps; "
                "give one of them (trainer.max_time may end it earlier)"
            )
        total = max(1, int(total))

        def share(step: int) -> float:  # not part of the checkpoint: a longer training may continue a shorter one
            warm_up = min(1.0, (step + 1) / (0.05 * total + 1))
            return warm_up * (1 + math.cos(math.pi * min(1.0, step / total))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the value alone, and what it was trained for."""
        checkpoint |= self.value.checkpoint() | {"fingerprints": self._fingerprints}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the value; UserError if the checkpoint holds none, or one that was trained with something else."""
        self.value.load_checkpoint(checkpoint, "the checkpoint")
        recorded, own = checkpoint.get("fingerprints", {}), self._fingerprints
        changed = sorted(name for name in recorded | own if recorded.get(name) != own.get(name))
        if recorded and own and changed:
            what = f"the training was begun with other contents of {', '.join(changed)}"
            raise OtherRun(f"{what}: restore what was there to continue it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueFitting":
        """Moves and converts model and value, as `to` and Lightning do; rewards keep their precision."""
        return super()._apply(sparing_rewards(self, fn), recurse)

    def _loss(self, batch: dict[str, Tensor], bootstrap: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the predictions and the rewards, both in units of the rewards' spread."""
        value = self.value
        text = None if self._prompt_features is None else self._prompt_features[batch["prompt"]]
        predictions = value.predict(batch["x"], batch["step"], text)
        targets = rewards = batch["reward"]
        if bootstrap:
            with torch.no_grad():
                ahead = value.predict(batch["next_x"], batch["next_step"].clamp(min=0), text)
            targets = torch.where(batch["next_step"] < 0, rewards, ahead)
        unit = batch["unit"].to(
            predictions
        )  # errors for other prompts, whose rewards differ more, count by their spread
        loss = value.loss(predictions * unit, targets.to(predictions) * unit, float(value.std))
        return loss, predictions.detach(), rewards
