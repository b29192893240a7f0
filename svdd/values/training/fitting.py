"""How a learned value is trained, as a part of the LightningModule."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from svdd import UserError
from svdd.values.learned import LearnedValue

__all__ = ["ValueFitting"]

_WEIGHT_DECAY = 1e-4
_WARM_UP = 0.05  # of all steps
_PROMPTS_AT_ONCE = 64


class ValueFitting(L.LightningModule):
    """Trains `self.value` on batches of `RolloutDataModule`; everything else stays as it was pretrained."""

    value: Any
    diffusion: Any
    rewards: Any

    @property
    def learned_value(self) -> LearnedValue:
        """The value, which must be one that learns.

        Raises:
            UserError: If it has nothing to train.
        """
        if not isinstance(self.value, LearnedValue):
            raise UserError(
                f"value {type(self.value).__name__} has nothing to train; choose one that learns, such as "
                "LatentConvValue (`svdd list value` shows all)"
            )
        return self.value

    def train(self, mode: bool = True) -> "ValueFitting":
        """Sets the mode of the value alone: the pretrained model and the rewards never train."""
        super().train(mode)
        for module in (self.diffusion, *self.rewards.values()):
            module.eval()
        return self

    def setup(self, stage: str) -> None:
        """Keeps the pretrained weights out of the gradient, for which DDP would wait: before DDP looks."""
        for name, parameter in self.named_parameters() if stage == "fit" else ():
            if not name.startswith("value."):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def learn_prompts(self, texts: list[str]) -> None:
        """Keeps the features of the prompts that batches refer to by index; encodes a block of them at once."""
        parts = []
        for start in range(0, len(texts), _PROMPTS_AT_ONCE):
            block = texts[start : start + _PROMPTS_AT_ONCE]
            features = self.diffusion.prompt_features(self.diffusion.encode(block, [None] * len(block)))
            parts += [] if features is None else [features]
        self._prompt_features = torch.cat(parts) if parts else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch of states, in units of the rewards' variance."""
        loss = self._loss(batch, self.learned_value.loss.bootstrap)[0]
        count = len(batch["step"])
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collects the estimates of held-out states; their loss is against the rewards even where training bootstraps.

        Against its own later estimates a value that knows nothing would do best.
        """
        loss, estimates, rewards = self._loss(batch, bootstrap=False)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["step"]), sync_dist=True)
        self._held_out.append((batch["step"].cpu(), estimates.float().cpu(), rewards.float().cpu()))

    def on_validation_epoch_start(self) -> None:
        """Forgets the last epoch's estimates."""
        self._held_out: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_validation_epoch_end(self) -> None:
        """Logs the rank correlation of estimate and reward, averaged over the steps (of this process's states)."""
        step, estimates, rewards = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        correlations = [
            spearman_corrcoef(estimates[step == i], rewards[step == i])
            for i in step.unique()
            if int((step == i).sum()) > 1
        ]
        mean = torch.stack(correlations).nanmean() if correlations else torch.tensor(torch.nan)
        self.log("val_spearman", mean.to(self.device), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW on the value's own parameters, with a short warm-up and a cosine to 0.

        Raises:
            UserError: If the training has no end that could be known now.
        """
        value = self.learned_value
        own = [parameter for parameter in value.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=value.learning_rate, weight_decay=_WEIGHT_DECAY)
        if math.isinf(total := self.trainer.estimated_stepping_batches):
            raise UserError(
                "the learning rate falls to 0 over the whole training, whose length must be known: got neither "
                "trainer.max_epochs nor trainer.max_steps; give one of them (trainer.max_time may end it earlier)"
            )
        total = max(1, int(total))

        def share(step: int) -> float:  # no part of the checkpoint: a longer training may continue a shorter one
            rising = min(1.0, (step + 1) / (_WARM_UP * total + 1))
            return rising * (1 + math.cos(math.pi * min(1.0, step / total))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the value alone, and what it was trained for."""
        if isinstance(self.value, LearnedValue):
            checkpoint["state_dict"] = {f"value.{name}": tensor for name, tensor in self.value.own_state().items()}
            checkpoint["svdd_value"] = self.value.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that was made for something else, and loads the value.

        Raises:
            UserError: If it holds no value of ours, or one of another kind.
        """
        if "svdd_value" not in checkpoint:
            raise UserError("the checkpoint was not written by `svdd fit`: it names no value")
        self.learned_value.check_identity(checkpoint["svdd_value"], "the checkpoint")
        state = {name.removeprefix("value."): tensor for name, tensor in checkpoint["state_dict"].items()}
        self.learned_value.adopt(state, "the checkpoint")

    def _loss(self, batch: dict[str, Tensor], bootstrap: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the estimates and the rewards, both in units of the rewards' spread."""
        value = self.learned_value
        text = None if self._prompt_features is None else self._prompt_features[batch["prompt"]]
        estimates = value.standard(batch["x"], batch["step"], text)
        rewards = (batch["reward"] - value.mean) / value.std
        targets = rewards
        if bootstrap:
            with torch.no_grad():
                ahead = value.standard(batch["next_x"], batch["next_step"].clamp(min=0), text)
            targets = torch.where(batch["next_step"] < 0, rewards, ahead)
        return value.loss(estimates, targets.to(estimates), float(value.std)), estimates.detach(), rewards
