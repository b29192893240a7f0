"""The callback that writes what one process draws for a run that another process holds."""

from pathlib import Path
from typing import Any

import lightning as L

from svdd.runs.prompts import PromptDataset
from svdd.runs.rows import ResultRow
from svdd.runs.writer import RunWriter

__all__ = ["AssistantWriter"]


class AssistantWriter(RunWriter):
    """Appends to shards of its own, which the process that holds the folder merges.

    Args:
        output: The run folder.
        rank: Of this process among those that draw the run, >= 1.
        prompts: As in `RunWriter`; so is `tar`.
        drawn: Receives the result rows of each batch; they are on disk after `flush`.
    """

    def __init__(
        self, output: str | Path, rank: int, prompts: PromptDataset, tar: bool, drawn: list[ResultRow]
    ) -> None:
        super().__init__(output, prompts=prompts, tar=tar)
        self.rank, self._rows = rank, drawn

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares the module with that of the owner."""
        self._compare(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes as many rows at once as the owner."""
        self._follow_rows_at_once(trainer, pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Begins to write a batch and notes its rows."""
        super().on_predict_batch_end(trainer, pl_module, outputs, *args)
        self._rows += outputs.rows

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the shards."""
        self.folder.close_shard()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Releases what is open."""
        self._release()
