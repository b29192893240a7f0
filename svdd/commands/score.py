"""`svdd score`: measures pictures that exist already."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from svdd import UserError, first_line
from svdd.commands.parser import Parser, as_user_errors, with_shipped_configs
from svdd.diffusion.chunking import Chunker
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.metrics import RewardStatistics
from svdd.rewards.base import Reward
from svdd.runs.config import write_config
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.runs.output import hold
from svdd.runs.pictures import Picture, find_pictures, read_pictures
from svdd.runs.prompts import PromptDataset

__all__ = ["print_measurements", "score", "score_parser"]

_LINE = "mean {mean:.4g} [{ci95_low:.4g}, {ci95_high:.4g}], std {std:.3g}, median {median:.4g}, top 10 % {top10:.4g}"
_NO_PROMPTS = "no prompts are known, so rewards that read them saw empty ones: --prompts"


def score_parser() -> Parser:
    """Returns the parser of `svdd score`."""
    parser = Parser(prog="svdd score", description="Scores existing pictures with any reward.")
    parser.add_argument("--config", action="config", help="YAML file with these settings.")
    parser.add_argument("--reward", type=Reward, required=True, help="What is measured.")
    parser.add_argument("--eval_rewards", type=list[Reward], default=[], help="More of the same.")
    parser.add_argument("--images", type=str, required=True, help="Folder of pictures, or a run folder.")
    prompts = "File with the pictures' prompts, in the order of their names (2 before 10); a run folder has its own."
    parser.add_argument("--prompts", type=str | None, default=None, help=prompts)
    parser.add_argument("--output", type=str | None, default=None, help="Folder for scores.jsonl and the summary.")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures at once.")
    parser.add_argument("--device", type=str, default="auto", help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")
    parser.add_class_arguments(Evaluation, "evaluation", skip={"baseline", "batch_size"})
    return parser


def score(words: list[str]) -> None:
    """Runs `svdd score` with the command line after its name; raises UserError for what the user can fix."""
    parser = score_parser()
    with as_user_errors():
        given = parser.parse_args(with_shipped_configs(words))
        settings = parser.instantiate_classes(given)
    with ExitStack() as around:
        if settings.output is not None:  # first, as scoring may take hours
            folder = Path(settings.output)
            with os_errors_explained(folder):
                around.callback(hold(folder, "score").release)
                write_config(folder, "score", yaml.safe_load(parser.dump(given, skip_none=False)))
        _run(settings)


def _run(settings: Any) -> None:
    """Scores the pictures, and prints and writes what was found."""
    device = _device(settings.device)
    settings.evaluation.check()
    pictures = _read_prompts(find_pictures(Path(settings.images)), Path(settings.images), settings.prompts)
    rewards = {reward.name: reward for reward in (settings.reward, *settings.eval_rewards)}
    if len(rewards) < 1 + len(settings.eval_rewards):
        names = ", ".join(reward.name for reward in (settings.reward, *settings.eval_rewards))
        raise UserError(f"rewards need distinct names, got {names}; remove the duplicate")
    rows, statistics = _score(pictures, rewards, settings.batch_size, device)
    if not any(picture.prompt for picture in pictures):
        print(f"svdd: warning: {_NO_PROMPTS}", file=sys.stderr)
    summary = {"images": len(rows), "rewards": statistics, **settings.evaluation.measure(pictures, device)}
    for name, entry in statistics.items():
        print(f"{name}: {_LINE.format_map(entry)}, {entry['count']:.0f} images")
    print_measurements(summary)
    if settings.output is not None:
        run = RunFolder(settings.output)
        with os_errors_explained(run.path):
            write_atomically(run.path / "scores.jsonl", b"".join(encode(row) + b"\n" for row in rows))
        run.write_summary(summary)
        print(f"wrote {settings.output}/scores.jsonl and {run.summary.name}")


def print_measurements(found: Mapping[str, Any]) -> None:
    """Prints what `Evaluation.measure` returned, one number a line."""
    for key in ("diversity", "distances"):
        for name, value in found.get(key, {}).items():
            print(f"{key}, {name}: {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}")


@torch.inference_mode()
def _score(pictures: list[Picture], rewards: dict[str, Reward], count: int, device: torch.device) -> tuple[list, dict]:
    """Returns one row per picture, and the statistics of each reward."""
    metrics = {name: RewardStatistics(higher_is_better=reward.higher_is_better) for name, reward in rewards.items()}
    rows, chunker = [], Chunker()
    for reward in rewards.values():
        reward.to(device).eval().load()
    for part, images in read_pictures(pictures, count):
        prompts, shown = [picture.prompt for picture in part], images.to(device)
        scores = {name: chunker.map(reward.score, len(part), shown, prompts).cpu() for name, reward in rewards.items()}
        for name, metric in metrics.items():
            metric.update(scores[name].double(), torch.tensor([picture.prompt_index for picture in part]))
        for k, picture in enumerate(part):
            file = str(picture.folder / picture.file)
            row = {"file": file, "prompt_index": picture.prompt_index, "prompt": picture.prompt}
            rows.append(row | {"rewards": {name: float(f"{values[k]:.7g}") for name, values in scores.items()}})
    return rows, {name: {k: v.item() for k, v in metric.compute().items()} for name, metric in metrics.items()}


def _read_prompts(pictures: list[Picture], folder: Path, file: str | None) -> list[Picture]:
    """Gives the pictures of a folder the prompts of a file, line by line; those of one prompt get its first index."""
    if file is None:
        return pictures
    if RunFolder(folder).results.is_file():
        raise UserError(f"{folder} is a run folder, which brings its own prompts: leave out --prompts")
    with as_user_errors(), closing(PromptDataset(file)) as dataset:
        texts = [dataset[k].text for k in range(len(dataset))]
    if len(texts) != len(pictures):
        found = f"{file} has {len(texts)} prompts for {len(pictures)} pictures in {folder}"
        raise UserError(f"{found}; expected one for each, in the order of the pictures' names")
    first = {text: k for k, text in reversed([*enumerate(texts)])}
    return [replace(pictures[k], prompt_index=first[text], prompt=text) for k, text in enumerate(texts)]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used: {first_line(error)}") from error
