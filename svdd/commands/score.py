"""`svdd score`: measures pictures that exist already."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import yaml

from svdd import UserError, require_at_least, say
from svdd.commands.parser import Parser, as_user_errors, with_shipped_configs
from svdd.commands.settings.own import COMMANDS, add_options
from svdd.diffusion.chunking import Chunker
from svdd.evaluation.evaluation import Evaluation
from svdd.evaluation.metrics import RewardStatistics
from svdd.rewards.base import Reward
from svdd.rewards.columns import Columns, columns_of
from svdd.runs.bounds import MAX_LINE
from svdd.runs.config import write_config
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.runs.output import check, hold
from svdd.runs.pictures import Picture, find_pictures, read_pictures
from svdd.runs.processes.devices import named_device
from svdd.runs.prompts import Prompt, PromptDataset
from svdd.runs.recorded_prompts import run_prompts_folder
from svdd.runs.secrets import refuse_secrets
from svdd.runs.yaml_text import read_yaml
from svdd.state.scoring import score as call

__all__ = ["print_measurements", "score", "score_parser"]

_NO_PROMPTS = "no prompts are known, so rewards that read them saw empty ones: --prompts"


def score_parser() -> Parser:
    """Returns the parser of `svdd score`."""
    parser, about = Parser(prog="svdd score"), COMMANDS["score"]
    parser.add_argument("--config", action="config")
    add_options(parser, about.options, reward=Reward, eval_rewards=list[Reward])
    skip = {name.removeprefix("evaluation.") for name in about.left_out}
    parser.add_class_arguments(Evaluation, "evaluation", skip=skip)
    return parser


def score(words: list[str]) -> None:
    """Runs `svdd score` with the command line after its name; raises UserError for what the user can fix."""
    if _names_benchmark(words):
        from svdd.commands.benchmark import score_benchmark

        return score_benchmark(words)
    parser = score_parser()
    with as_user_errors():
        given = parser.parse_args(with_shipped_configs(words))
        refuse_secrets(config := yaml.safe_load(parser.dump(given, skip_none=False)))
        settings = parser.instantiate_classes(given)
        require_at_least(1, batch_size=settings.batch_size)
    rewards = {reward.name: reward for reward in (settings.reward, *settings.eval_rewards)}
    if len(rewards) < 1 + len(settings.eval_rewards):
        names = ", ".join(reward.name for reward in (settings.reward, *settings.eval_rewards))
        raise UserError(f"rewards need distinct names, got {names}; remove the duplicate")
    columns = columns_of(*rewards.values())
    device, (pictures, source) = named_device(settings.device), _find(settings, columns)
    folder = None if settings.output is None else Path(settings.output)
    with ExitStack() as around:
        if folder is not None:
            with os_errors_explained(folder):
                check(folder, "score")
        settings.evaluation.check(len({(picture.prompt_index, picture.image) for picture in pictures}))  # reads weights
        if folder is not None:  # before scoring, which may take hours
            with os_errors_explained(folder):
                around.callback(hold(folder, "score").release)
                write_config(folder, "score", config)
        rows, statistics = _score(pictures, rewards, settings.batch_size, device, partial(_text, columns, source))
        if not any(picture.prompt for picture in pictures):
            say(f"svdd: warning: {_NO_PROMPTS}", error=True)
        summary = {"images": len(rows), "rewards": statistics, **settings.evaluation.measure(pictures, device)}
        for name, entry in statistics.items():
            say(f"{name}: {_words(entry)}, {entry['count']:.0f} images")
        print_measurements(summary)
        if folder is not None:
            run = RunFolder(folder)
            with os_errors_explained(folder):
                write_atomically(folder / "scores.jsonl", b"".join(encode(row) + b"\n" for row in rows))
            run.write_summary(summary)
            say(f"wrote {folder}/scores.jsonl and {run.summary.name}")


def _names_benchmark(words: list[str]) -> bool:
    """Returns whether the command line, or a configuration that it names, selects a benchmark."""
    if any(re.match(r"--benchmark\b", word) for word in words):
        return True
    with as_user_errors():
        files = [
            Path(word.removeprefix("--config="))
            for before, word in pairwise(["", *with_shipped_configs(words)])
            if before == "--config" or word.startswith("--config=")
        ]
        found = [read_yaml(file.read_text("utf-8", errors="replace")) for file in files if file.is_file()]
    return any(isinstance(settings, dict) and "benchmark" in settings for settings in found)


def print_measurements(found: Mapping[str, Any]) -> None:
    """Prints what `Evaluation.measure` returned, one measurement a line."""
    for key in ("diversity", "distances"):
        for name, value in found.get(key, {}).items():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]  # KID has a mean and a deviation
            words = (f"{part} {_number(number)}".strip() for part, number in parts)
            say(f"{key}, {name}: {', '.join(words)}")


def _number(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(entry: Mapping[str, float]) -> str:
    """Returns the statistics of a reward as text, without those that are unknown."""
    interval = f" [{entry['ci95_low']:.4g}, {entry['ci95_high']:.4g}]" if math.isfinite(entry["standard_error"]) else ""
    spread = f", std {entry['std']:.3g}" if math.isfinite(entry["std"]) else ""
    return f"mean {entry['mean']:.4g}{interval}{spread}, median {entry['median']:.4g}, top 10 % {entry['top10']:.4g}"


@torch.inference_mode()
def _score(
    pictures: list[Picture],
    rewards: dict[str, Reward],
    count: int,
    device: torch.device,
    text_of: Callable[[Picture], str] = attrgetter("prompt"),
) -> tuple[list, dict]:
    """Returns one row per picture, and the statistics of each reward, which reads `text_of` each picture."""
    metrics = {name: RewardStatistics(higher_is_better=reward.higher_is_better) for name, reward in rewards.items()}
    rows, chunker = {}, Chunker()
    for reward in rewards.values():
        reward.to(device).eval().load()
    by_prompt = any(reward.groupwise for reward in rewards.values())
    for part, images in _whole_prompts(pictures) if by_prompt else read_pictures(pictures, count):
        prompts, shown = [text_of(picture) for picture in part], images.to(device)
        scores = {name: call(reward, chunker, 1, shown, prompts).cpu() for name, reward in rewards.items()}
        for name, metric in metrics.items():
            indices, weights = zip(*((picture.prompt_index, picture.weight) for picture in part), strict=True)
            metric.update(scores[name].double(), torch.tensor(indices), torch.tensor(weights, dtype=torch.float64))
        for k, picture in enumerate(part):
            file = str(picture.folder / picture.file)
            row = {"file": file, "prompt_index": picture.prompt_index, "prompt": picture.prompt}
            rows[file] = row | {"rewards": {name: float(f"{values[k]:.7g}") for name, values in scores.items()}}
    ordered = [rows[str(picture.folder / picture.file)] for picture in pictures]
    return ordered, {name: {k: v.item() for k, v in metric.compute().items()} for name, metric in metrics.items()}


def _whole_prompts(pictures: list[Picture]) -> Iterator[tuple[list[Picture], torch.Tensor]]:
    """Yields all pictures of a prompt at once, which a groupwise reward compares; UserError if that cannot be."""
    for _, same in groupby(sorted(pictures, key=lambda each: each.prompt_index), key=lambda each: each.prompt_index):
        group = list(same)
        parts = list(read_pictures(group, len(group)))
        if len(parts) > 1:
            sizes = "they differ in size, or are too many"
            raise UserError(f"the {len(group)} pictures of {group[0].prompt!r} cannot be compared at once: {sizes}")
        yield parts[0]


def _find(settings: Any, columns: Columns) -> tuple[list[Picture], str | None]:
    """Returns the pictures, and the folder to which paths in their columns refer.

    Those of a folder get the prompts of a file, line by line, and each the index of the first that is the same.
    """
    folder, file, names = Path(settings.images), settings.prompts, {**columns.needed, **columns.optional}
    pictures = find_pictures(folder, names)
    if file is None:
        source = run_prompts_folder(folder)
        rows = [_prompt(picture, source) for picture in pictures] if names else []
        columns.check(rows, lambda k: f"{folder / pictures[k].file}")
        return pictures, source
    if RunFolder(folder).has_rows():
        raise UserError(f"{folder} is a run folder, which brings its own prompts: leave out --prompts")
    with as_user_errors(), closing(PromptDataset(file, settings.prompt_column, max_prompt_length=MAX_LINE)) as dataset:
        if len(dataset) != len(pictures):
            name = file if isinstance(file, str) else "--prompts"
            found = f"{name} has {len(dataset)} prompts for {len(pictures)} pictures in {folder}"
            raise UserError(f"{found}; expected one that is not blank for each, in the order of the pictures' names")
        columns.check(dataset, dataset.place)
        given, first = list[Picture](), dict[str, int]()
        for picture, prompt in zip(pictures, dataset, strict=True):
            index = first.setdefault(prompt.text, prompt.index)
            extra = {name: prompt.extra[name] for name in names if name in prompt.extra}
            given.append(replace(picture, prompt_index=index, prompt=prompt.text, extra=extra))
        return given, dataset.folder


def _prompt(picture: Picture, source: str | None) -> Prompt:
    return Prompt(picture.prompt_index, picture.prompt, None, None, dict(picture.extra), source)


def _text(columns: Columns, source: str | None, picture: Picture) -> str:
    return columns.text(_prompt(picture, source))
