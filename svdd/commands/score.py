"""`svdd score`: measures pictures that exist already."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from svdd import UserError, first_line
from svdd.commands.parser import Parser, as_user_errors, with_shipped_configs
from svdd.diffusion.chunking import Chunker
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.metrics import RewardStatistics
from svdd.rewards.base import Reward
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.runs.pictures import Picture, find_pictures, read_pictures
from svdd.runs.prompts import PromptDataset

__all__ = ["print_measurements", "score"]


def score(words: Sequence[str]) -> None:
    """Runs `svdd score` with the command line after its name.

    Raises:
        UserError: If an argument, a picture or a prompt is wrong, or a reward fails.
    """
    parser = Parser(prog="svdd score", description="Scores existing pictures with any reward.")
    parser.add_argument("--config", action="config", help="YAML file with these settings.")
    parser.add_argument("--reward", type=Reward, required=True, help="What is measured.")
    parser.add_argument("--eval_rewards", type=list[Reward], default=[], help="More of the same.")
    parser.add_argument("--images", type=str, required=True, help="Folder of pictures, or a run folder.")
    order = "in the order of their names (2 before 10); a run folder brings its own."
    parser.add_argument(
        "--prompts", type=str | None, default=None, help=f"File with the prompt of each picture, {order}"
    )
    parser.add_argument("--output", type=str | None, default=None, help="Folder for scores.jsonl and the summary.")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures at once.")
    parser.add_argument("--device", type=str, default="auto", help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")
    parser.add_class_arguments(Evaluation, "evaluation", skip={"baseline", "batch_size"})
    with as_user_errors():
        settings = parser.instantiate_classes(parser.parse_args(with_shipped_configs(words)))
    device = _device(settings.device)
    settings.evaluation.check()
    pictures = _read_prompts(find_pictures(Path(settings.images)), Path(settings.images), settings.prompts)
    rows, statistics = _measure(pictures, [settings.reward, *settings.eval_rewards], settings.batch_size, device)
    if not any(picture.prompt for picture in pictures):
        unknown = "no prompts are known, so rewards that read them saw empty ones: --prompts"
        print(f"svdd: warning: {unknown}", file=sys.stderr)
    summary = {"images": len(rows), "rewards": statistics, **settings.evaluation.measure(pictures, device)}
    for name, entry in statistics.items():
        print(
            f"{name}: mean {entry['mean']:.4g} [{entry['ci95_low']:.4g}, {entry['ci95_high']:.4g}], "
            f"std {entry['std']:.3g}, median {entry['median']:.4g}, top 10 % {entry['top10']:.4g}, "
            f"{entry['count']:.0f} images"
        )
    print_measurements(summary)
    if settings.output is not None:
        run = RunFolder(settings.output)
        with os_errors_explained(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run.path / "scores.jsonl", b"".join(encode(row) + b"\n" for row in rows))
        run.write_summary(summary)
        print(f"wrote {settings.output}/scores.jsonl and {run.summary.name}")


def print_measurements(found: Mapping[str, Any]) -> None:
    """Prints what `Evaluation.measure` returned, one number a line."""
    for key in ("diversity", "distances"):
        for name, value in found.get(key, {}).items():
            print(f"{key}, {name}: {'-' if value is None else f'{value:.4g}' if isinstance(value, float) else value}")


@torch.inference_mode()
def _measure(
    pictures: list[Picture], rewards: list[Reward], batch_size: int, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Returns one row per picture, and the statistics of each reward."""
    metrics = {reward.name: RewardStatistics(higher_is_better=reward.higher_is_better) for reward in rewards}
    if len(metrics) < len(rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise UserError(f"rewards need distinct names, got {names}; remove the duplicate")
    rows: list[dict[str, Any]] = []
    chunker = Chunker()
    for reward in rewards:
        reward.to(device).eval().load()
    for part, images in read_pictures(pictures, batch_size):
        prompts, shown = [picture.prompt for picture in part], images.to(device)
        scores = {reward.name: chunker.map(reward.score, len(part), shown, prompts).cpu() for reward in rewards}
        for name, metric in metrics.items():
            metric.update(scores[name].double(), torch.tensor([picture.prompt_index for picture in part]))
        for k, picture in enumerate(part):
            numbers = {name: float(f"{values[k]:.7g}") for name, values in scores.items()}
            place = {"prompt_index": picture.prompt_index, "prompt": picture.prompt}
            rows.append({"file": str(picture.folder / picture.file), **place, "rewards": numbers})
    return rows, {name: {k: v.item() for k, v in metric.compute().items()} for name, metric in metrics.items()}


def _read_prompts(pictures: list[Picture], folder: Path, file: str | None) -> list[Picture]:
    """Gives the pictures of a folder the prompts of a file, line by line; those of one prompt get its first index."""
    if file is None:
        return pictures
    if RunFolder(folder).results.is_file():
        raise UserError(f"{folder} is a run folder, which brings its own prompts: leave out --prompts")
    with as_user_errors():
        dataset = PromptDataset(file)
    texts = [dataset[k].text for k in range(len(dataset))]
    dataset.close()
    if len(texts) != len(pictures):
        raise UserError(
            f"{file} has {len(texts)} prompts for {len(pictures)} pictures in {folder}; expected one for each, in the "
            "order of the pictures' names"
        )
    first = {text: k for k, text in reversed([*enumerate(texts)])}
    pairs = zip(pictures, texts, strict=True)
    return [replace(picture, prompt_index=first[text], prompt=text) for picture, text in pairs]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used: {first_line(error)}") from error
