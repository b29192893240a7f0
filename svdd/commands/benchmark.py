"""`svdd score --benchmark`: the numbers of a public benchmark for the pictures of a run."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from svdd import UserError, did_you_mean, require_at_least, say
from svdd.commands.parser import Parser, as_user_errors, with_shipped_configs
from svdd.commands.settings.own import COMMANDS, add_options
from svdd.diffusion.chunking import Chunker
from svdd.evaluation.benchmarks import BENCHMARKS
from svdd.evaluation.benchmarks.base import Benchmark, Entry
from svdd.evaluation.benchmarks.matching import Matched, match
from svdd.evaluation.benchmarks.summary import OVERALL, Line, Score, summarise
from svdd.evaluation.rendering import render
from svdd.rewards.base import Reward
from svdd.rewards.columns import Columns, columns_of
from svdd.runs.config import write_config
from svdd.runs.files import os_errors_explained, write_atomically
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.runs.output import check, hold
from svdd.runs.pictures import find_pictures, read_pictures
from svdd.runs.processes.devices import named_device
from svdd.runs.recorded_prompts import PROMPTS
from svdd.runs.secrets import refuse_secrets

__all__ = ["benchmark_parser", "score_benchmark"]


def benchmark_parser() -> Parser:
    """Returns the parser of `svdd score --benchmark`."""
    parser = Parser(prog="svdd score")
    parser.add_argument("--config", action="config")
    kinds = {"benchmark": Benchmark, "reward": Reward | None, "eval_rewards": list[Reward]}
    add_options(parser, COMMANDS["score --benchmark"].options, **kinds)
    parser.add_argument("run", type=str, help="Run folder, drawn with the benchmark's prompts.")
    return parser


def score_benchmark(words: list[str]) -> None:
    """Runs `svdd score --benchmark` with the command line after `score`; raises UserError for what users can fix."""
    parser = benchmark_parser()
    with as_user_errors():
        given = parser.parse_args(with_shipped_configs(_with_class(words)))
        refuse_secrets(config := yaml.safe_load(parser.dump(given, skip_none=False)))
        settings = parser.instantiate_classes(given)
        require_at_least(1, batch_size=settings.batch_size)
    benchmark: Benchmark = settings.benchmark
    rewards = [*([settings.reward] if settings.reward else []), *settings.eval_rewards] or benchmark.default_rewards()
    if len({reward.name for reward in rewards}) < len(rewards):
        raise UserError(f"rewards need distinct names, got {', '.join(reward.name for reward in rewards)}")
    if ranks := next((reward.name for reward in rewards if reward.groupwise), None):
        what = f"{ranks} compares the pictures of a prompt with each other, and its mean over them says nothing"
        raise UserError(f"{what} about a benchmark; name the reward by which it compares")
    columns = columns_of(*rewards)
    entries, matched = _find(benchmark, settings, columns)
    device, folder = named_device(settings.device), None if settings.output is None else Path(settings.output)
    with ExitStack() as around:
        if folder is not None:  # before scoring, which may take hours
            with os_errors_explained(folder):
                check(folder, "score")
                around.callback(hold(folder, "score").release)
                write_config(folder, "score", config)
        for note in matched.notes:
            say(f"svdd: warning: {note}", error=True)
        rows, scores = _judge(benchmark, rewards, columns, entries, matched, settings.batch_size, device)
        proportions = frozenset({benchmark.metric} if benchmark.proportion else ())
        lines = summarise(scores, proportions, benchmark.known, benchmark.whole)
        if not benchmark.overall:
            lines = [line for line in lines if (line.metric, line.category) != (benchmark.metric, OVERALL)]
        say(table(lines).rstrip())
        if folder is not None:
            found = {"benchmark": type(benchmark).__name__, "images": len(rows), "prompts": len({*matched.entries})}
            found |= {"notes": matched.notes, "results": [_plain(line) for line in lines]}
            with os_errors_explained(folder):
                write_atomically(folder / "scores.jsonl", b"".join(encode(row) + b"\n" for row in rows))
            run = RunFolder(folder)
            run.write_summary(found)
            say(f"wrote {folder}/scores.jsonl and {run.summary.name}")


def _with_class(words: list[str]) -> list[str]:
    """Returns a command line with the class of the benchmark in place of its name."""
    found = list(words)
    for k, word in enumerate(words):
        option, equals, name = word.partition("=")
        if option in ("--benchmark", "--benchmark.help"):
            if not equals and k + 1 < len(words):
                found[k + 1] = _class_of(words[k + 1])
            elif equals:
                found[k] = f"{option}={_class_of(name)}"
    return found


def _class_of(name: str) -> str:
    if "." not in name and name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"--benchmark {name}: there is no such benchmark; known: {known}{did_you_mean(name, BENCHMARKS)}"
        )
    return BENCHMARKS.get(name, name)


def _find(benchmark: Benchmark, settings: Any, columns: Columns) -> tuple[list[Entry], Matched]:
    """Returns the prompts of the benchmark and the run's pictures of them; raises UserError if they do not fit."""
    folder = Path(settings.run)
    pictures = find_pictures(folder)
    if not RunFolder(folder).has_rows():
        raise UserError(f"{folder} is no run folder, so the prompts of its pictures are unknown; draw them with svdd")
    source = str(folder / PROMPTS) if settings.benchmark_prompts is None else settings.benchmark_prompts
    with as_user_errors():
        entries = benchmark.read(source)
    columns.check(entries, lambda k: f"{source}, the prompt {entries[k].text!r}")
    if settings.benchmark_prompts is None and len(entries) < benchmark.size and not settings.partial:
        what = f"{folder} was drawn with {len(entries)} of the {benchmark.size} prompts"
        raise UserError(f"{what}; draw all, give --benchmark_prompts, or measure these with --partial")
    return entries, match(entries, pictures, settings.partial)


@torch.inference_mode()
def _judge(
    benchmark: Benchmark,
    rewards: Sequence[Reward],
    columns: Columns,
    entries: Sequence[Entry],
    matched: Matched,
    count: int,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[Score]]:
    """Returns a row for each picture, and all numbers."""
    benchmark.to(device).eval().load()
    for reward in rewards:
        reward.to(device).eval().load()
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    chunker, places = Chunker(), iter(matched.entries)
    for part, images in read_pictures(matched.pictures, count):
        shown, indices = images.to(device), [next(places) for _ in part]
        own = [entries[k] for k in indices]
        judgements = benchmark.judge(shown, own)
        prompts = [columns.text(entry) for entry in own]
        measured = {
            reward.name: chunker.map(reward.score, len(part), shown, prompts, work=("reward", reward)).tolist()
            for reward in rewards
        }
        for j, (picture, index, entry, judgement) in enumerate(zip(part, indices, own, judgements, strict=True)):
            row = {"file": str(picture.folder / picture.file), "prompt_index": index, "prompt": entry.text}
            row |= {"image": picture.image, "category": entry.category, **judgement.details}
            row |= {"scores": dict(judgement.scores)} if judgement.scores else {}
            row |= (
                {"rewards": {name: float(f"{values[j]:.7g}") for name, values in measured.items()}} if rewards else {}
            )
            rows.append(row)
            for category, value in judgement.scores.items():
                weight = picture.weight * judgement.weights.get(category, 1.0)
                scores.append(Score(category, benchmark.metric, value, index, weight))
            for name, values in measured.items():
                scores.append(Score(entry.category, name, values[j], index, picture.weight))
    return rows, scores


def table(lines: Sequence[Line]) -> str:
    """Returns the numbers as a table of text."""
    rows = [
        [line.metric, line.category, f"{line.mean:.4g}", _interval(line), str(line.prompts), f"{line.images:g}"]
        for line in lines
    ]
    return render(["metric", "category", "mean", "95 % interval", "prompts", "images"], rows, "text")


def _interval(line: Line) -> str:
    return f"[{line.low:.4g}, {line.high:.4g}]" if math.isfinite(line.low) else ""


def _plain(line: Line) -> dict[str, Any]:
    """Returns a number for the summary."""
    names = {"low": "ci95_low", "high": "ci95_high"}
    return {names.get(name, name): value for name, value in line._asdict().items()}
