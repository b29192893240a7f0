"""`svdd predict`: guided images for a set of prompts, in a run folder."""

import hashlib
import sys
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from svdd import Incomplete, UserError
from svdd.commands.base import ModelCLI
from svdd.commands.parser import as_user_errors
from svdd.commands.progress import StepProgress
from svdd.evaluation.baseline import against, over_optimised, warning
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.log_samples import report
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.pictures import find_pictures
from svdd.runs.processes.stop import StopOnSignal
from svdd.runs.prompts import PromptDataModule
from svdd.runs.writer import RunWriter
from svdd.values.weights import weights_file

__all__ = ["PredictCLI"]


class PredictCLI(ModelCLI):
    """Opens the run folder and reads the prompts before any weight is loaded."""

    builds = (GuidedDiffusion, PromptDataModule, L.Trainer)

    writer: RunWriter
    finished: set[int]
    evaluation: Evaluation

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Prediction; what it returns is on disk, not in memory."""
        return {"predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds how images are stored, how long a process waits for others, and what is measured on the images."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Evaluation, "evaluation")
        parser.add_argument(
            "--tar", type=bool, default=False, help="Write images into tar shards (WebDataset) instead of PNG files."
        )
        parser.add_argument(
            "--patience",
            type=float,
            default=3600.0,
            help="Seconds that a process which is through waits for others while none of them finishes a batch.",
        )

    def before_instantiate_classes(self) -> None:
        """Checks prompts and run folder, which is fast, before weights are loaded, which is slow."""
        config = self.config["predict"]
        with as_user_errors():
            self.stop = StopOnSignal(self.group, config.patience)
            prompts = PromptDataModule(**config.data.as_dict())
            self.evaluation = Evaluation(**config.evaluation.as_dict())
            self.evaluation.check()
        digest, num_prompts = prompts.dataset.digest, len(prompts.dataset)
        prompts.teardown("predict")
        plain = self.resolved()
        plain["data"]["prompts_sha256"] = digest
        with as_user_errors():
            plain |= _value_digest(plain["model"].get("value"))
            self.writer = RunWriter(config.output, plain, config.overwrite, num_prompts, config.tar)
        self._around.callback(self.writer.close)
        self.finished = self.writer.open(scan=False, hold=True)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the run writer and, on a terminal, our progress bar in place of Lightning's."""
        wanted = self._get(self.config_init, "trainer.enable_progress_bar", default=True) is not False
        if self.model.sampler.needs_gradient:
            kwargs["inference_mode"] = False
        trainer: Any = super().instantiate_trainer(enable_progress_bar=False, **kwargs)
        trainer.callbacks += [self.writer, *([StepProgress()] if wanted and sys.stderr.isatty() else []), self.stop]
        return trainer

    def before_predict(self) -> None:
        """Leaves out what the folder already holds, and says what a budget came to."""
        if self.trainer.is_global_zero and self.model.budget is not None:
            chosen = self.model.chosen
            words = ", ".join(f"{name}={number}" for name, number in chosen.items())
            backward = " (a backward pass counts as 2 more rows)" if "gradient_rows" in chosen else ""
            print(f"budget {self.model.budget}: {type(self.model.sampler).__name__} with {words} per image{backward}")
        self.datamodule.skip(self.finished)

    def after_predict(self) -> None:
        """Says where the images are and how they score.

        Raises:
            UserError: If there is no image.
            Incomplete: If prompts have failed; everything else is done by then.
        """
        summary = self.model.summary
        if self.trainer.is_global_zero and summary:
            failed = self.writer.failed_prompts
            if failed:
                where = f"see {self.writer.folder.failures}; the same command tries them again"
                print(f"svdd: {failed} prompts could not be drawn: {where}", file=sys.stderr)
            if failed and not summary["rewards"][summary["guide"]]["count"]:
                raise UserError("no prompt could be drawn, so no picture was made")
            guide = summary["rewards"][summary["guide"]]
            print(f"{guide['count']:.0f} images in {self.writer.folder.path}/images")
            for name, entry in summary["rewards"].items():
                by_weight = f", by weight {entry['weighted_mean']:.4g}" if "weighted_mean" in entry else ""
                print(f"{name}: mean {entry['mean']:.4g}, standard error {entry['standard_error']:.2g}{by_weight}")
            print(f"denoiser rows per image: {summary['denoiser_rows_per_image']:.0f}")
            self._evaluate(summary)
            if failed:
                raise Incomplete(3)

    def _evaluate(self, summary: dict[str, Any]) -> None:
        """Measures the finished pictures, adds what was found to the summary, and warns of over-optimisation."""
        folder, baseline = self.writer.folder, self.evaluation.baseline
        found = self.evaluation.measure(find_pictures(folder.path), self.trainer.strategy.root_device)
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


def _value_digest(value: Any) -> dict[str, str]:
    """Returns the SHA-256 of a learned value's weights, which belongs to the settings of a run as well as their name.

    Args:
        value: The settings of the value, as the configuration has them.
    """
    pretrained = value.get("init_args", {}).get("pretrained") if isinstance(value, dict) else None
    path = weights_file(str(pretrained))
    return {"value_sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if pretrained and path.is_file() else {}
