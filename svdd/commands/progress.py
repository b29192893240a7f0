"""The progress bars of `svdd predict`."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from tqdm import tqdm

__all__ = ["StepProgress"]


class StepProgress(L.Callback):
    """Shows the prompts of this process, the current step and the mean value there; only on rank 0."""

    def __init__(self) -> None:
        self._prompts: tqdm | None = None
        self._steps: tqdm | None = None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the bars and registers for the steps of the module."""
        if not trainer.is_global_zero:
            return
        prompts = getattr(trainer.predict_dataloaders.dataset, "num_prompts", None)  # of this device; None: unknown
        self._prompts = tqdm(total=prompts, desc="prompts", position=0)
        self._steps = tqdm(total=pl_module.diffusion.num_inference_steps, desc="steps", position=1, leave=False)
        pl_module.on_step = self._show_step

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Sequence[Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the outer bar on."""
        if self._prompts is not None:
            self._prompts.update(len(batch))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the bars."""
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Closes the bars, so that they do not overwrite the error."""
        self._close(pl_module)

    def _show_step(self, i: int, value: float | None) -> None:
        if self._steps is not None:
            self._steps.n = i
            if value is not None:
                self._steps.set_postfix_str(f"mean value {value:.4g}", refresh=False)
            self._steps.refresh()

    def _close(self, pl_module: Any) -> None:
        for bar in (self._steps, self._prompts):
            if bar is not None:
                bar.close()
        self._steps = self._prompts = None
        pl_module.on_step = None
