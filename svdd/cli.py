"""`svdd predict`: LightningCLI with registry names, a run folder and errors in one line."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from svdd.class_change import forget_arguments_on_class_change
from svdd.data import PromptDataModule
from svdd.errors import UserError
from svdd.module import GuidedDiffusion
from svdd.parser_errors import explain
from svdd.progress import StepProgress
from svdd.registry import import_all
from svdd.writer import RunWriter

__all__ = ["run"]


class _Parser(LightningArgumentParser):
    """Reports a bad argument as the error that `svdd` prints in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError."""
        raise UserError(explain(message))


class _PredictCLI(LightningCLI):
    """Opens the run folder and reads the prompts before any weight is loaded."""

    writer: RunWriter
    finished: set[int]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only prediction so far; what it returns is on disk, not in memory."""
        return {"predict": {"model", "dataloaders", "datamodule", "return_predictions", "ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder, and the classes whose arguments can be given without naming them."""
        parser.set_defaults(
            {
                "model.diffusion": {"class_path": "svdd.diffusion.stable_diffusion.StableDiffusion"},
                "model.sampler": {"class_path": "svdd.samplers.svdd.SVDD"},
                "model.value": {"class_path": "svdd.values.posterior_mean.PosteriorMean"},
            }
        )
        parser.add_argument("--output", type=str, default="runs/latest", help="Run folder; a started one continues.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Remove the earlier run in the folder.")

    def before_instantiate_classes(self) -> None:
        """Checks prompts and run folder, which cost nothing, before weights, which do."""
        config = self.config["predict"]
        with _refusals():
            prompts = PromptDataModule(**config.data.as_dict())
        digest = prompts.digest
        prompts.teardown("predict")
        plain = yaml.safe_load(self._parser("predict").dump(config, skip_none=False))
        plain.pop("config", None)
        plain["data"]["prompts_sha256"] = digest
        with _refusals():
            self.writer = RunWriter(config.output, plain, config.overwrite)
        self.finished = self.writer.open()

    def instantiate_classes(self) -> None:
        """Builds everything; what a constructor refuses is the user's to repair."""
        with _refusals():
            super().instantiate_classes()

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

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "return_predictions": False}


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs `svdd predict`.

    Args:
        arguments: The command line, beginning with the command's name; the process's own by default.

    Raises:
        UserError: For everything that the user can repair.
    """
    import_all()
    forget_arguments_on_class_change()
    _hush()
    _PredictCLI(
        GuidedDiffusion,
        PromptDataModule,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"enable_model_summary": False, "logger": False, "enable_checkpointing": False},
        auto_configure_optimizers=False,
        parser_class=_Parser,
        args=None if arguments is None else list(arguments),
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a constructor says about its arguments into the user's error."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(explain(str(error))) from error


def _hush() -> None:
    """Keeps remarks of the libraries that no user can act on out of the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "isinstance.treespec, LeafSpec",
        "have many workers",
        "ranks is zero",
        "LightningCLI's args parameter",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
