"""The commands with a configuration: their own options, and the classes whose arguments are their other settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from svdd.evaluation.benchmarks import BENCHMARKS

__all__ = ["COMMANDS", "REQUIRED", "Command", "Option", "add_options"]

REQUIRED: Any = ...  # in place of a default


class Option(NamedTuple):
    """An option of a command itself: its name, its type, its help, its default.

    The type is text where importing it takes seconds; `add_options` is given the type itself.
    """

    name: str
    kind: Any
    help: str
    default: Any = None


@dataclass(frozen=True)
class Command:
    """A command whose settings may come from a configuration.

    Attributes:
        purpose: The first line of its help.
        options: Its own.
        parts: The classes whose arguments are its other settings, by the first part of their dotted names.
        classes: The default classes below `model`, whose arguments can be given without naming them.
        defaults: Of settings of the parts, where they are not those of the classes.
        left_out: Settings of the parts that it does not have.
    """

    purpose: str
    options: tuple[Option, ...]
    parts: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


def add_options(parser: Any, options: tuple[Option, ...], **kinds: Any) -> None:
    """Adds options to a parser of jsonargparse; `kinds` are the types that `options` names."""
    for name, kind, purpose, default in options:
        kind = kinds.get(name, kind)
        if default is REQUIRED:
            parser.add_argument(f"--{name}", type=kind, required=True, help=purpose)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=purpose)


_CLASSES = {
    "diffusion": "svdd.diffusion.auto.AutoDiffusion",
    "sampler": "svdd.samplers.svdd.SVDD",
    "value": "svdd.values.posterior_mean.PosteriorMean",
}
_LEARNED = Option("ckpt_path", str | None, "A learned value's file, or checkpoint; takes the place of `model.value`.")
_PROMPT_MODULE = "svdd.runs.prompts.PromptDataModule"
_EVALUATION = "svdd.evaluation.evaluation.Evaluation"
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_TRAINER_DEFAULTS = {
    "trainer.enable_model_summary": False,
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
}


def _run(folder: str) -> tuple[Option, ...]:
    return (
        Option("output", str, "Run folder; a started one continues.", folder),
        Option("overwrite", bool, "Remove the earlier run in the folder.", False),
        Option("max_restarts", int, "How often all processes restart after one of several has died.", 0),
    )


def _parts(module: str, data: str = _PROMPT_MODULE) -> dict[str, str]:
    return {"model": module, "data": data, "trainer": _TRAINER}


_PICTURES = (
    Option("prompt_column", str, "Column, or JSON key, of the prompts.", "prompt"),
    Option("device", str, "`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.", "auto"),
)
_MEASURED = (
    Option("output", str | None, "Folder for scores.jsonl and the summary."),
    Option("batch_size", int, "Pictures at once.", 64),
)

COMMANDS = {
    "predict": Command(
        "Draws guided images for a list of prompts, into a run folder.",
        (
            *_run("runs/latest"),
            Option(
                "dry_run",
                bool,
                "Print rows, time, memory and disk of the run, from one measured batch, and write nothing.",
                False,
            ),
            _LEARNED,
            Option("tar", bool, "Write WebDataset tar shards instead of PNG files.", False),
            Option(
                "patience",
                float,
                "Seconds to wait for other processes, once done, while none of them finishes a batch.",
                3600.0,
            ),
            Option(
                "step_timeout",
                float | None,
                "Seconds after which a process whose step does not finish is ended; by default never.",
            ),
        ),
        {**_parts("svdd.guided_diffusion.GuidedDiffusion"), "evaluation": _EVALUATION},
        _CLASSES,
        _TRAINER_DEFAULTS,
    ),
    "fit": Command(
        "Trains a learned value on rollouts of the pretrained model.",
        _run("runs/fit"),
        _parts("svdd.values.training.fitting.ValueFitting", "svdd.values.training.data.RolloutDataModule"),
        {"diffusion": _CLASSES["diffusion"], "value": "svdd.values.latent_conv.LatentConvValue"},
        _TRAINER_DEFAULTS | {"trainer.max_epochs": 20, "trainer.num_sanity_val_steps": 0},
    ),
    "calibrate": Command(
        "Measures how well a value predicts the reward, step by step.",
        (*_run("runs/calibration"), _LEARNED),
        _parts("svdd.values.training.calibration.Calibration"),
        {name: _CLASSES[name] for name in ("diffusion", "value")},
        _TRAINER_DEFAULTS,
    ),
    "score": Command(
        "Scores existing pictures with any reward.",
        (
            Option("reward", "Reward", "What is measured.", REQUIRED),
            Option("eval_rewards", "list[Reward]", "More of the same.", []),
            Option("images", str, "Folder of pictures, or a run folder.", REQUIRED),
            Option(
                "prompts",
                list[str] | str | None,
                "The pictures' prompts, a file or a list, in the order of their names (2 before 10); a run has its "
                "own.",
            ),
            *_MEASURED,
            *_PICTURES,
        ),
        {"evaluation": _EVALUATION},
        left_out=frozenset({"evaluation.baseline", "evaluation.batch_size", "evaluation.unpaired"}),
    ),
    "score --benchmark": Command(
        "Measures the pictures of a run on a public benchmark.",
        (
            Option(
                "benchmark",
                "Benchmark",
                f"{', '.join(BENCHMARKS)}; `svdd score --benchmark.help NAME` shows its own settings.",
                REQUIRED,
            ),
            Option(
                "benchmark_prompts",
                str | None,
                "The benchmark's prompt file as published. Default: the prompts that the run recorded.",
            ),
            Option("partial", bool, "Measure what is there, if prompts lack pictures.", False),
            Option("reward", "Reward | None", "A reward that is measured by category."),
            Option("eval_rewards", "list[Reward]", "More of the same.", []),
            *_MEASURED,
            _PICTURES[1],
        ),
    ),
    "test-reward": Command(
        "Tests a reward, built-in or your own: class or function.",
        (
            Option("reward", "Reward", "What is tested; the word may be left out.", REQUIRED),
            Option(
                "images",
                str | None,
                "Folder of pictures, or a run folder, of which up to 8 are used; by default drawn shapes.",
            ),
            Option(
                "prompts",
                list[str] | str | None,
                "The pictures' prompts, a file or a list, with the columns that the reward needs; by default file "
                "names.",
            ),
            Option("tolerance", float, "How much rounding may change a score.", 1e-5),
            *_PICTURES,
        ),
    ),
}
