"""`svdd test-reward`: whether a reward keeps to what svdd expects, and how long it takes."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from svdd import UserError, say
from svdd.commands.parser import Parser, as_user_errors, with_shipped_configs
from svdd.commands.settings.own import COMMANDS, add_options
from svdd.evaluation.reward_checks import findings, seconds_per_image
from svdd.evaluation.reward_trials import Trial, drawn
from svdd.rewards.base import Reward
from svdd.rewards.columns import columns_of
from svdd.rewards.conversion import as_reward
from svdd.runs.pictures import find_pictures, read_pictures
from svdd.runs.processes.devices import named_device
from svdd.runs.prompts import PromptDataset
from svdd.runs.tracebacks import Tracebacks

__all__ = ["reward_parser", "test_reward"]

_MOST = 8  # pictures
_WORDS = {True: "pass", False: "FAIL", None: "skip"}


def reward_parser() -> Parser:
    """Returns the parser of `svdd test-reward`."""
    parser = Parser(prog="svdd test-reward")
    parser.add_argument("--config", action="config")
    add_options(parser, COMMANDS["test-reward"].options, reward=Reward)
    return parser


def test_reward(words: list[str]) -> None:
    """Runs `svdd test-reward` with the command line after its name.

    Raises:
        UserError: If the reward cannot be built, or pictures or prompts cannot be read.
        SystemExit: With code 1, if a check fails.
    """
    parser = reward_parser()
    named = ["--reward", *words] if words and not words[0].startswith("-") else words
    with as_user_errors():
        given = parser.parse_args(with_shipped_configs(named))
        settings = parser.instantiate_classes(given)
        device = named_device(settings.device)
        reward = as_reward(settings.reward).to(device).eval()
        images, prompts = _samples(settings)
        reward.load()
    trial = Trial(
        reward, images.to(device), prompts, lambda: parser.instantiate_classes(given).reward, settings.tolerance
    )
    say(f"{reward.name} on {device}, {len(images)} pictures of {images.shape[3]} x {images.shape[2]}")
    tracebacks, failed, total, shown = Tracebacks(), 0, 0, dict[str, str]()
    for found in findings(trial):
        failed, total = failed + (found.passed is False), total + 1
        tracebacks.show(found.traceback)
        first = shown.setdefault(found.message, found.check)
        message = found.message if first == found.check or not found.message else "as above"
        say(f"  {_WORDS[found.passed]}  {found.check}{f': {message}' if message else ''}")
    if failed:
        say(f"svdd: {failed} of {total} checks failed", error=True)
        raise SystemExit(1)
    scores = ", ".join(f"{score:.4g}" for score in trial.scores.tolist())
    say(f"scores: {scores}")
    say(f"{1000 * seconds_per_image(trial):.3g} ms an image, {len(images)} at once")


test_reward.__test__ = False  # type: ignore[attr-defined]  # for pytest


def _check_prompt(checks: Sequence[Callable[[str], None]], prompt: str) -> None:
    """Raises UserError if a reward refuses a prompt."""
    try:
        for check in checks:
            check(prompt)
    except UserError as error:
        raise UserError(f"{error}; --prompts FILE gives others") from error


def _samples(settings: Any) -> tuple[Tensor, list[str]]:
    """Returns pictures of one size and their prompts, with the columns that the reward reads."""
    columns = columns_of(settings.reward)
    images, prompts = drawn()
    if settings.images is not None:
        pictures = find_pictures(Path(settings.images))[:_MOST]
        parts = [part for _, part in read_pictures(pictures, 1)]
        images = torch.cat([interpolate(part, parts[0].shape[2:], mode="area") for part in parts])
        prompts = [picture.prompt or Path(picture.file).stem.replace("_", " ") for picture in pictures]
    if settings.prompts is not None:
        with closing(PromptDataset(settings.prompts, settings.prompt_column)) as dataset:
            columns.check(dataset, dataset.place)
            prompts = [columns.text(dataset[k]) for k in range(min(len(dataset), len(images)))]
    elif columns.needed:
        name, needs = next(iter(columns.needed.items()))
        raise UserError(f"{needs} needs the column {name!r}: give --prompts FILE, a prompt file with that column")
    else:
        for prompt in prompts:
            _check_prompt(columns.checks, prompt)
    count = min(len(images), len(prompts))
    if count < 2:
        raise UserError(f"expected at least two pictures with prompts, got {count}")
    return images[:count], prompts[:count]
