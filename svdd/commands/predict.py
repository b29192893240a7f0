"""`svdd predict`: guided images for a set of prompts, in a run folder."""

import json
import math
import re
from collections.abc import Collection
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from svdd import Incomplete, UserError, say
from svdd.commands.base import ModelCLI
from svdd.commands.estimate import Estimate, describe, describe_peak, estimate
from svdd.commands.parser import as_user_errors
from svdd.commands.progress import progress
from svdd.commands.score import print_measurements
from svdd.evaluation.baseline import against, difference_words, over_optimised, verdict
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.log_samples import report
from svdd.evaluation.selections import idle
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.bounds import check_images
from svdd.runs.pictures import find_pictures
from svdd.runs.processes.group import Group, is_rank_zero
from svdd.runs.processes.stop import StopOnSignal
from svdd.runs.processes.watchdog import StepTimeout
from svdd.runs.prompts import PromptDataModule
from svdd.runs.writer import RunWriter

__all__ = ["PredictCLI"]

_PHOTOGRAPHS = 24  # latents a side: models of larger pictures than the embedded ones
_ONE_PROMPT = "no standard error from one prompt"


class PredictCLI(ModelCLI):
    """Opens the run folder and reads the prompts before any weight is loaded."""

    command, builds = "predict", (GuidedDiffusion, PromptDataModule, L.Trainer)
    finished: Collection[int] = ()  # indices of the prompts that the folder holds
    label: str | None = ""  # what stands before the progress; None hides it

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is measured on the images."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Evaluation, "evaluation")

    def _join(self) -> Group | None:
        """Starts no other process for a dry run, and ends all but one that a launcher has started."""
        if not self.settings.dry_run:
            return super()._join()
        if not is_rank_zero():
            raise SystemExit(0)
        return None

    def before_instantiate_classes(self) -> None:
        """Checks prompts and run folder, which is fast, before weights are loaded, which is slow."""
        with as_user_errors():
            self.stop = StopOnSignal(self.group, self.settings.patience)
            self.watchdog = StepTimeout(self.settings.step_timeout)
            self.prompts = prompts = PromptDataModule(**self.settings.data.as_dict())
            self._around.callback(prompts.teardown)
            check_images(len(prompts.dataset), self.settings.model.images_per_prompt)
            self.evaluation = Evaluation(**self.settings.evaluation.as_dict())
            images = len(prompts.dataset) * self.settings.model.images_per_prompt
            plain = self.resolved()
            self.evaluation.check(images, prompts.dataset, plain)
            output, overwrite, tar = self.settings.output, self.settings.overwrite, self.settings.tar
            self.writer = RunWriter(output, plain, overwrite, prompts.dataset, tar)
        if self.settings.dry_run:
            self.finished = self.writer.folder.peek(plain, overwrite, prompts.dataset)
            return
        self._around.callback(self.writer.close)
        self.finished = self.writer.open(scan=False, hold=True)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the run writer and what shows the progress, unless the user has set a bar."""
        wanted = self._get(self.config_init, "trainer.enable_progress_bar", default=True) is not False
        if self.model.sampler.needs_gradient:
            kwargs["inference_mode"] = False
        given = self._get(self.config_init, "trainer.callbacks") or []
        own = any(isinstance(each, ProgressBar) for each in (given if isinstance(given, list) else [given]))
        trainer: Any = super().instantiate_trainer(enable_progress_bar=own and wanted, **kwargs)
        wanted = wanted and not own and trainer.is_global_zero and self.label is not None
        shown = [progress(len(self.finished), self.label or "")] if wanted else []
        trainer.callbacks += [self.writer, *shown, self.watchdog, self.stop]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Draws, or estimates what that would cost."""
        if not self.settings.dry_run:
            return super()._run_subcommand(subcommand)
        for line in describe(*self.estimated()):
            say(line)

    def estimated(self) -> tuple[Estimate, int, torch.device]:
        """Returns what the run costs, on how many devices, and the device on which that was measured."""
        self._check_model()
        devices, dataset = self.trainer.num_devices * self.trainer.num_nodes, self.prompts.dataset
        left = len(dataset) - len(self.finished)
        if isinstance(limit := self.trainer.limit_predict_batches, int):
            left = min(left, limit * self.datamodule.batch_size * devices)
        where, precision = self.trainer.strategy.root_device, self.trainer.precision_plugin
        batch_size = min(self.datamodule.batch_size, max(1, -(-left // devices)))
        return estimate(self.model, dataset, batch_size, left, where, precision), devices, where

    def before_predict(self) -> None:
        """Leaves out what the folder already holds, and prints what a budget chose."""
        self._check_model()
        self.datamodule.adopt(self.prompts)  # the source may have changed since they were compared
        self.datamodule.skip(self.finished)

    def _check_model(self) -> None:
        """Checks the columns that rewards read, compares with the baseline, and prints what a budget chose."""
        self.model.check_prompts(self.prompts.dataset)
        if self.evaluation.baseline is not None:
            self.evaluation.check_model(self.model.rewards, self.model.fingerprints())
        if self.trainer.is_global_zero and self.model.budget is not None:
            chosen = self.model.chosen
            words = ", ".join(f"{name}={number}" for name, number in chosen.items())
            backward = " (a backward pass counts as 2 more rows)" if "gradient_rows" in chosen else ""
            say(f"budget {self.model.budget}: {type(self.model.sampler).__name__} with {words} per image{backward}")
        if self.trainer.is_global_zero and (said := self._out_of_place()):
            say(f"svdd: warning: {said}", error=True)

    def _out_of_place(self) -> str:
        """Returns a warning if a reward of the embedded CLIPs, such as that of `quickstart`, meets a larger model."""
        model, known = self.settings.model, {"emoji", "emoji-judge"}
        rewards = json.dumps([reward.as_dict() for reward in (model.reward, *(model.eval_rewards or ()))], default=str)
        found = sorted(known & {*re.findall(r'"pretrained": "([^"]*)"', rewards)})
        if not found or min(self.model.diffusion.latent_shape[-2:]) < _PHOTOGRAPHS:
            return ""
        advice = "choose another CLIP, such as pretrained: openai/clip-vit-large-patch14"
        return f"CLIPScore with pretrained: {' or '.join(found)} is for emoji of 64 x 64 pixels only; {advice}"

    def after_predict(self) -> None:
        """Prints where the images are and how they score; raises Incomplete at the end if prompts have failed."""
        summary, failed = self.model.summary, self.writer.failed_prompts
        if not self.trainer.is_global_zero or not summary:
            return
        count = summary["rewards"][summary["guide"]]["count"]
        if failed:
            where = f"see {self.writer.folder.failures}; the same command tries them again"
            what = "prompt" if failed == 1 else "prompts"
            say(f"svdd: {failed} {what} could not be drawn: {where}", error=True)
            if not count:
                raise UserError("no prompt could be drawn, so no picture was made")
        say(f"{count:.0f} images in {self.writer.folder.path}/images")
        for name, entry in summary["rewards"].items():
            known = math.isfinite(error := entry["standard_error"])
            said = f"standard error {error:.2g} (clustered by prompt)" if known else _ONE_PROMPT
            spread = f", std {entry['std']:.3g}" if math.isfinite(entry["std"]) else ""
            say(f"{name}: mean {entry['mean']:.4g}, {said}{spread}")
        rows, network_rows = (summary[f"{name}_per_image"] for name in ("denoiser_rows", "network_rows"))
        say(f"denoiser rows per image: {rows:.0f}, network rows: {network_rows:.0f}")
        if (peak := self.writer.folder.peaks.largest()) is not None:
            say(f"memory: {describe_peak(peak, self.trainer.strategy.root_device)}")
        if said := idle(self.model.sampler, summary):
            say(f"svdd: warning: {said}", error=True)
        self._evaluate(summary)
        if failed:
            raise Incomplete(3)

    def _evaluate(self, summary: dict[str, Any]) -> None:
        """Measures the finished pictures, adds what was found to the summary file, and warns of over-optimisation."""
        folder, baseline = self.writer.folder, self.evaluation.baseline
        found = self.evaluation.measure(find_pictures(folder.path), self.trainer.strategy.root_device)
        if baseline is not None:
            comparison = against(folder.path, baseline, self.evaluation.unpaired)
            better = {name: reward.higher_is_better for name, reward in self.model.rewards.items()}
            fallen = over_optimised(comparison, summary["guide"], better)
            found["baseline"] = {"folder": str(baseline), "rewards": comparison, "over_optimised": fallen}
            for name, entry in comparison.items():
                say(f"{name} - {baseline}: {difference_words(entry)}")
            if lacking := [name for name in better if name not in comparison and name != summary["guide"]]:
                say(f"svdd: warning: {baseline} has no {', '.join(lacking)} to compare with", error=True)
            if said := verdict(comparison, summary["guide"], fallen, baseline):
                say(f"svdd: warning: {said}", error=True)
            else:
                say(f"over-optimisation: none found against {baseline}")
        if found:
            folder.amend_summary(found)
            print_measurements(found)
        report(self.trainer.loggers, found, folder.path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "return_predictions": False}
