"""`svdd predict`: guided images for a set of prompts, in a run folder."""

import hashlib
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from svdd.baseline import against, over_optimised, warning
from svdd.commands.base import ModelCLI, refusals
from svdd.data import PromptDataModule
from svdd.errors import UserError
from svdd.evaluation import Evaluation
from svdd.log_samples import report
from svdd.progress import StepProgress
from svdd.writer import RunWriter

__all__ = ["PredictCLI"]


class PredictCLI(ModelCLI):
    """Opens the run folder and reads the prompts before any weight is loaded."""

    writer: RunWriter
    finished: set[int]
    evaluation: Evaluation

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is measured on the finished pictures."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Evaluation, "evaluation")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Prediction; what it returns is on disk, not in memory."""
        return {"predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"}}

    def before_instantiate_classes(self) -> None:
        """Checks prompts and run folder, which cost nothing, before weights, which do."""
        config = self.config["predict"]
        with refusals():
            prompts = PromptDataModule(**config.data.as_dict())
            self.evaluation = Evaluation(**config.evaluation.as_dict())
            self.evaluation.check()
        digest = prompts.digest
        prompts.teardown("predict")
        plain = self.resolved()
        plain["data"]["prompts_sha256"] = digest
        if config.ckpt_path is not None:
            plain["ckpt_sha256"] = _digest(config.ckpt_path)
        with refusals():
            self.writer = RunWriter(config.output, plain, config.overwrite)
        self.finished = self.writer.open()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the run writer and, where somebody watches, our progress bar in place of Lightning's."""
        wanted = self._get(self.config_init, "trainer.enable_progress_bar", default=True) is not False
        if self.model.sampler.needs_gradient:
            kwargs["inference_mode"] = False
        trainer: Any = super().instantiate_trainer(enable_progress_bar=False, **kwargs)
        trainer.callbacks += [self.writer, *([StepProgress()] if wanted and sys.stderr.isatty() else [])]
        return trainer

    def before_predict(self) -> None:
        """Leaves out what the folder already holds, and says what a budget came to."""
        if self.trainer.is_global_zero and self.model.budget is not None:
            *count, rows = (f"{name}={number}" for name, number in self.model.chosen.items())
            words = " ".join([type(self.model.sampler).__name__, *(["with", *count] if count else [])])
            print(f"budget {self.model.budget}: {words}, {rows} per image")
        self.datamodule.skip(self.finished)

    def after_predict(self) -> None:
        """Says where the images are and how they score."""
        summary = self.model.summary
        if self.trainer.is_global_zero and summary:
            guide = summary["rewards"][summary["guide"]]
            print(f"{guide['count']:.0f} images in {self.writer.folder.path}/images")
            for name, entry in summary["rewards"].items():
                print(f"{name}: mean {entry['mean']:.4g}, standard error {entry['standard_error']:.2g}")
            print(f"denoiser rows per image: {summary['denoiser_rows_per_image']:.0f}")
            self._evaluate(summary)

    def _evaluate(self, summary: dict[str, Any]) -> None:
        """Measures the finished pictures, adds what was found to the summary, and warns of over-optimisation."""
        folder, baseline = self.writer.folder, self.evaluation.baseline
        found = self.evaluation.measure(folder.path, self.model.device)
        if baseline is not None:
            comparison = against(folder.path, baseline)
            better = {name: reward.higher_is_better for name, reward in self.model.rewards.items()}
            fallen = over_optimised(comparison, summary["guide"], better)
            found |= {"baseline": {"folder": str(baseline), "rewards": comparison, "over_optimised": fallen}}
            for name, entry in comparison.items():
                interval = f"[{entry['ci95_low']:+.3g}, {entry['ci95_high']:+.3g}]"
                print(f"{name} - {baseline}: {entry['difference']:+.3g} {interval}")
            if fallen:
                print(f"svdd: warning: {warning(comparison, summary['guide'], fallen, baseline)}", file=sys.stderr)
        if found:
            summary |= found
            folder.amend_summary(found)
            for name, value in found.get("diversity", {}).items():
                print(f"diversity, {name}: {'-' if value is None else format(value, '.4g')}")
            for name, value in found.get("distances", {}).items():
                print(f"{name}: {value}")
        report(self.trainer.loggers, found, folder.path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "return_predictions": False}


def _digest(path: str) -> str:
    """Returns the SHA-256 of a checkpoint, which belongs to the settings of a run."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"ckpt_path={path!r} cannot be read: {error.strerror}") from error
