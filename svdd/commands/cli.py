"""Runs the commands that need a model: imports what one of them needs."""

import logging
import sys
import warnings
from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs `svdd predict`, `fit`, `calibrate` or `score`.

    Args:
        arguments: The command line, beginning with the command's name; the process's own by default.

    Raises:
        UserError: For everything that the user can fix.
    """
    _hide_messages()
    command = (sys.argv[1:] if arguments is None else arguments)[0]
    words = None if arguments is None else list(arguments)
    if command == "predict":
        from svdd.commands.predict import PredictCLI

        PredictCLI(words)
    elif command == "fit":
        from svdd.commands.fit import FitCLI

        FitCLI(words)
    elif command == "calibrate":
        from svdd.commands.calibrate import CalibrateCLI

        CalibrateCLI(words)
    else:
        from svdd.commands.score import score

        score((sys.argv[1:] if arguments is None else arguments)[1:])


def _hide_messages() -> None:
    """Hides messages of the libraries that a user cannot act on."""
    import lightning  # noqa: F401 (its import sets the level of its logger)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    for message in (
        "isinstance.treespec, LeafSpec",
        "have many workers",
        "ranks is zero",
        "LightningCLI's args parameter",
        "Cannot enable progress bars",  # we turned them off
        "module\\(s\\) in eval mode",  # the pretrained model, on purpose
        "smaller than the logging interval",
        "exists and is not empty",  # a training that continues
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
