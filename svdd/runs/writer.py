"""The callback that writes a run to disk while it is under way, so that an interrupted run can continue."""

import time
from contextlib import ExitStack, closing, suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from torchmetrics import Metric

from svdd import UserError, first_line, say
from svdd.runs.background import Background
from svdd.runs.encoding import VERSIONS, encoded, pixels_of
from svdd.runs.files import RunError
from svdd.runs.folder import Entries, RunFolder
from svdd.runs.peaks import PEAK_MEMORY
from svdd.runs.prediction import Prediction
from svdd.runs.processes.group import is_rank_zero
from svdd.runs.prompts import PromptDataset
from svdd.runs.rows import ResultRow
from svdd.runs.tracebacks import Tracebacks

__all__ = ["RunError", "RunWriter"]

_MOST_FAILURES = 20  # in a row; then the prompts are not the cause


class RunWriter(L.Callback):
    """Writes each batch while the next one is drawn: images, traces, result rows, and at the end a summary.

    At most one batch is written while the next one is drawn. All are on disk when the epoch ends, and when
    `on_exception` returns. If a batch cannot be written, the next hook raises the error, or `close` after another one.

    Call `open` before anything costly is built, and leave the prompts that it returns out of the data. The module
    must take the rows of an earlier run through `record(rows)`, return a `Prediction` from `predict_step`, and hold
    its statistics in `summary` after its own `on_predict_epoch_end`. If it has `fingerprints()`, a run continues only
    while these are the same, and if it has `columns`, while the files are that rewards read by the prompts' columns.

    Args:
        output: The run folder; a run with the same settings continues.
        config: The resolved configuration, recorded and compared with that of an earlier run.
        overwrite: Remove the files of an earlier run in the folder, and no others.
        prompts: The run's, recorded and compared too: see `RunFolder.claim`.
        tar: Write the images into tar shards instead of a file each.
    """

    def __init__(
        self,
        output: str | Path,
        config: dict[str, Any] | None = None,
        overwrite: bool = False,
        prompts: PromptDataset | None = None,
        tar: bool = False,
    ) -> None:
        self.folder = RunFolder(output, tar)
        self.config, self.overwrite, self.prompts = config or {}, overwrite, prompts
        self._started: float | None = None  # when the folder was opened; None while it is not
        self._drawn = self._held = False
        self.rank: int | None = None  # under which this process writes, if it is not that of the Trainer
        self._rows_at_once: int | None = None  # as recorded
        self._memory: Any = None  # a `PeakMemory`; None if the module has no diffusion model that measures it
        self._failures = 0  # in a row, up to now
        self._tracebacks = Tracebacks()
        self._writing = Background("svdd-writer")
        self.failed_prompts = 0  # of this prediction, once it has ended

    def open(self, scan: bool = True, hold: bool = False) -> set[int]:
        """Prepares the folder and returns the indices of the prompts that are finished; call it on every process.

        Only rank 0 changes anything; it holds the folder until the prediction ends, or with `hold` until `close`.
        Without `scan` the other processes return no index; the data module sends them those of rank 0.
        """
        if is_rank_zero():
            finished = self.folder.claim(self.config, self.overwrite, self.prompts)
        else:
            finished = self.folder.finished() if scan and not self.overwrite else set()
        self._started, self._drawn, self._held, self._failures = time.monotonic(), False, hold, 0
        return finished

    def flush(self) -> None:
        """Returns when all batches that were drawn are on disk; raises the error if one could not be written."""
        self._writing.wait()

    def close(self) -> None:
        """Waits for the last batch and releases the folder; raises the error if that batch could not be written."""
        self._writing.join()
        self.folder.close()
        self._started = None
        self.flush()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Opens the folder if it is not open; it must then be new, as its prompts would be drawn again.

        Compares the module with what an earlier run here used, before it is moved to its device.
        """
        if stage != "predict":
            return
        if self._started is None and (finished := self.open()):
            self.close()
            raise RunError(
                f"{self.folder.path} already holds {len(finished)} finished prompts: call RunWriter.open() before "
                "Trainer.predict and leave out the prompts that it returns, or set overwrite=True"
            )
        if trainer.is_global_zero and not self.folder.held:
            found = "an environment variable such as NODE_RANK or RANK says that another process does"
            raise RunError(f"{self.folder.path} is not held by this process, the first of the run: {found}; unset it")
        self._compare(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens this process's shards, and begins to measure its memory: the module is on its device."""
        self._drawn = True
        self.folder.open_shard(self._rank(trainer))
        diffusion = cast(Any, getattr(pl_module, "diffusion", None))
        self._memory = diffusion.peak_memory() if hasattr(diffusion, "peak_memory") else None

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the module what an earlier run left, after its own `on_predict_start`: its rows, and rows at once."""
        self._follow_rows_at_once(trainer, pl_module)
        self._restore(trainer, pl_module)

    def _follow_rows_at_once(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (chunker := _chunker(pl_module)) is not None:
            chunker.most = self._rows_at_once = self.folder.record_rows_at_once(chunker.most, self._rank(trainer))

    def _rank(self, trainer: L.Trainer) -> int:
        return trainer.global_rank if self.rank is None else self.rank

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the rows of an earlier run to the module."""
        if not trainer.is_global_zero or not self.folder.results.exists():
            return
        module, rows, line = cast(Any, pl_module), self.folder.rows(), 0
        while part := list(islice(rows, 1024)):
            try:
                module.record(part)
            except (KeyError, TypeError, ValueError) as error:  # a row that was edited by hand
                bad = next((k for k, row in enumerate(part) if not _is_recordable(module, row)), 0)
                where = f"{self.folder.results}, line {line + bad + 1}, is not a row of this run ({first_line(error)})"
                raise RunError(f"{where}: remove the line and start the same command again") from error
            line += len(part)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Begins to write a batch, which must be a `Prediction`, once the one before is on disk.

        Raises a UserError if 20 prompts in a row have failed.
        """
        self.flush()
        if not isinstance(outputs, Prediction):
            raise ValueError(f"predict_step must return a Prediction, got {type(outputs).__name__}")
        if (chunker := _chunker(pl_module)) is not None and chunker.most != self._rows_at_once:  # memory ran out
            self._rows_at_once = self.folder.record_rows_at_once(chunker.most, self._rank(trainer))
        peak = None if self._memory is None else self._memory.peak()
        self._writing.start(self._write, pixels_of(outputs), outputs.rows, outputs.traces, outputs.failures, peak)
        for failure in outputs.failures:
            said = f"svdd: skipped {failure['prompt']!r}: {failure['error']}"
            self._tracebacks.show(failure.get("traceback", ""), said)
        self._failures = len(outputs.failures) + (0 if outputs.rows else self._failures)
        if self._failures >= _MOST_FAILURES:
            raise UserError(
                f"{self._failures} prompts in a row could not be drawn, the last with {outputs.failures[-1]['error']}; "
                "finished images are kept: fix the cause and start the same command again"
            )

    def _write(
        self, pixels: np.ndarray, rows: list[ResultRow], traces: Entries, failures: Entries, peak: int | None
    ) -> None:
        """Runs in a thread of its own."""
        with closing(encoded(pixels, rows)) as images:
            self.folder.write(images, traces, failures, peak)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits until all batches are on disk: then come the statistics, and the wait for other processes."""
        self.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges the files of all processes and writes the summary that the module has computed by now."""
        self.folder.close_shard()
        trainer.strategy.barrier("svdd.RunWriter")
        if trainer.is_global_zero:
            self._finish(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Releases the folder; if no prompt was left to draw, computes the summary, and writes it if it is missing.

        Without a batch Lightning calls none of the hooks above. Rank 0 then works alone, from the rows on disk: the
        module is already on the CPU, where NCCL's collectives do not work.
        """
        if stage != "predict" or self._started is None:
            return
        if not self._drawn and trainer.is_global_zero:
            self._restore(trainer, pl_module)
            with ExitStack() as stack:
                for metric in pl_module.modules():
                    if isinstance(metric, Metric):
                        stack.callback(setattr, metric, "distributed_available_fn", metric.distributed_available_fn)
                        metric.distributed_available_fn = lambda: False
                pl_module.on_predict_epoch_end()
            if not self.folder.has_summary():
                self._finish(pl_module)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Releases the folder once the batch that was drawn last is written; what is written stays for the next run."""
        self._release()

    def _compare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares what the images depend on beyond the settings with that of an earlier run, and of rank 0."""
        module = cast(Any, pl_module)
        found = module.fingerprints() if hasattr(module, "fingerprints") else {}
        first = trainer.strategy.broadcast(found)
        if other := [name for name in first if first[name] != found.get(name)]:
            where = f"process {trainer.global_rank} has other contents of {', '.join(other)} than process 0"
            raise RunError(f"{where}: all machines need the same files")
        versions = {**VERSIONS, "transformers": version("transformers")}
        if trainer.is_global_zero and (changed := self.folder.fingerprint(found, versions)):
            text = f"{self.folder.path} was begun with {', '.join(changed)}: images may differ in the last bits"
            say(f"svdd: warning: {text}", error=True)
        if trainer.is_global_zero and self.prompts is not None and hasattr(module, "columns"):
            self.folder.compare_contents(module.columns.contents(self.prompts))

    def _finish(self, pl_module: L.LightningModule) -> None:
        assert self._started is not None
        prompts, images, self.failed_prompts = self.folder.merge()
        counts = {"prompts": prompts, "images": images, "failed_prompts": self.failed_prompts}
        cost: dict[str, Any] = {"wall_seconds": round(time.monotonic() - self._started, 3)}
        if (peak := self.folder.peaks.largest()) is not None:
            cost[PEAK_MEMORY] = peak
        self.folder.write_summary({**counts, **cast(Any, pl_module).summary, **cost})

    def _release(self) -> None:
        if self._held:  # until `close`, which raises the error of the last batch
            self._writing.join()
            self.folder.close_shard()
        else:
            self.close()


def _chunker(pl_module: Any) -> Any:
    """Returns the `Chunker` of the module's diffusion model, if it has one."""
    return getattr(getattr(pl_module, "diffusion", None), "chunker", None)


def _is_recordable(module: Any, row: ResultRow) -> bool:
    with suppress(KeyError, TypeError, ValueError):
        module.record([row])
        return True
    return False
