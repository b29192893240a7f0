"""Pairs the images of runs by prompt text, image index and random seed, and says why runs cannot be paired."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from svdd import UserError
from svdd.evaluation.sides import Positions, Side, digest

__all__ = ["counted", "incomparable", "mismatches", "omissions", "other_model", "pair", "require_pairs", "same_prompts"]

_SHOWN = 3  # examples in a message
_STEPS = "model.diffusion.num_inference_steps"
_PRECISION = ("trainer.precision", "model.diffusion.dtype")  # other ones give other digests of the same weights
_MODEL = tuple(f"model.diffusion.{name}" for name in ("pretrained", "revision", "lora", "weight_name", "lora_scale"))


class Measured(Protocol):
    """A run whose rewards are compared: see `Side`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration by dotted key; {} if it is unknown."""

    @property
    def rewards(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """The scores of each reward."""

    @property
    def parts(self) -> Mapping[str, str]:
        """The recorded digests of weights; {} if they are unknown."""


def pair(sides: Sequence[Side]) -> list[Positions]:
    """Returns the positions in each side of the images that all sides have, in the first side's order."""
    shared = reduce(np.intersect1d, [side.keys for side in sides])
    found = []
    for side in sides:
        order = np.argsort(side.keys)
        found.append(order[np.searchsorted(side.keys, shared, sorter=order)])
    order = np.argsort(found[0])
    return [positions[order] for positions in found]


def mismatches(one: Side, other: Side) -> list[str]:
    """Returns what differs, apart from the settings to be compared: steps, model, or seeds of the same prompts."""
    found = []
    steps = [side.settings.get(_STEPS) for side in (one, other)]
    if None not in steps and steps[0] != steps[1]:
        found.append(f"num_inference_steps is {steps[0]} in {one.name} and {steps[1]} in {other.name}")
    if model := other_model(one, other):
        found.append(model)
    if not np.isin(one.texts, other.texts).any():
        first = [_distinct(side, np.arange(len(side.keys)))[1] for side in (one, other)]
        return [*found, f"{one.name} and {other.name} share no prompt: {first[0]} in one, {first[1]} in the other"]
    seeds = _other_seeds(one, other)
    return [*found, seeds] if seeds else found


def require_pairs(sides: Sequence[Side], advice: str, complete: str = "") -> list[str]:
    """Checks that the first side can be paired with each other one, and returns why some images have no partner.

    Args:
        sides: The runs; the first one is the one with which the others are compared.
        advice: What to do otherwise, the end of the error's message.
        complete: What to do if the first side lacks images of another; by default it may.

    Raises:
        UserError: If the runs have other steps, models, prompts or seeds, or one lacks images for no known reason.
    """
    notes = []
    for other in sides[1:]:
        found = mismatches(sides[0], other)
        lacking = []
        for one, second in [(sides[0], other)] + [(other, sides[0])] * bool(complete):
            unknown, known = omissions(one, second, images=not found)
            lacking += unknown
            notes += known
        if found or lacking:
            what = found + lacking if np.isin(sides[0].texts, other.texts).any() else found
            raise UserError(f"{'; '.join(what)}; {advice if found or not complete else complete}")
    return list(dict.fromkeys(notes))


def other_model(one: Side, other: Side) -> str:
    """Returns how the pretrained models differ: by their digests, or else by their settings; empty if they do not."""
    parts = [
        {name: content for name, content in side.parts.items() if name.startswith("diffusion.")}
        for side in (one, other)
    ]
    names = [name for name in parts[0] if name != "diffusion.configuration"]  # that also holds the number of steps
    if all(parts) and _same_precision(one, other):
        changed = [name.partition(".")[2] for name in names if parts[0][name] != parts[1].get(name)]
        changed = changed if parts[0].keys() == parts[1].keys() else changed or ["other parts"]
        what = f"other weights of {', '.join(changed)}" if changed else ""
    else:
        changed = [name for name in _MODEL if one.settings.get(name) != other.settings.get(name)]
        known = one.settings and other.settings
        what = "; ".join(f"other {name}" for name in changed) if known else ""
    if not what:
        return ""
    models = [side.settings.get(_MODEL[0]) for side in (one, other)]
    named = f" ({models[0]} and {models[1]})" if models[0] != models[1] else ""
    return f"{one.name} and {other.name} have {what}{named}"


def omissions(one: Side, other: Side, images: bool = True) -> tuple[list[str], list[str]]:
    """Returns what the other side lacks: for no known reason, and because it is unfinished or prompts failed.

    Without `images`, only prompts count of which it has no image at all.
    """
    lacking = np.flatnonzero(~np.isin(one.keys, other.keys))
    absent = lacking[~np.isin(one.texts[lacking], other.texts)]
    failed = np.isin(one.texts[absent], np.array([*other.failed], one.texts.dtype))
    if other.unfinished:
        return [], [f"{other.name} is not finished"] * bool(len(lacking))
    unknown, known = [], []
    if not failed.all():
        count, first = _distinct(one, absent[~failed])
        unknown.append(f"{other.name} lacks {counted(count, 'prompt')} of {one.name}, {first}")
    if failed.any():
        known.append(f"{counted(len(np.unique(one.texts[absent[failed]])), 'prompt')} failed in {other.name}")
    more = np.setdiff1d(lacking, absent)
    if images and len(more):
        count, first = _distinct(one, more)
        unknown.append(f"{other.name} has fewer images than {one.name} of {counted(count, 'prompt')}, {first}")
    return unknown, known


def same_prompts(one: npt.NDArray[np.bytes_], other: npt.NDArray[np.bytes_]) -> bool:
    """Whether two sets of images have the same prompts, given the digests of their texts."""
    return np.array_equal(np.unique(one), np.unique(other))


def incomparable(one: Measured, other: Measured) -> set[str]:
    """Returns the rewards of one name that were measured with other weights or settings."""
    return {
        name
        for name in one.rewards.keys() & other.rewards.keys()
        if len({side.parts.get(f"reward {name}", "") for side in (one, other)} - {""}) > 1
    }


def _same_precision(one: Measured, other: Measured) -> bool:
    both = [name for name in _PRECISION if name in one.settings and name in other.settings]
    return all(one.settings[name] == other.settings[name] for name in both)


def _other_seeds(one: Side, other: Side) -> str:
    """Returns the images of the same prompts and indices with other seeds; empty if there are none."""
    left = [
        np.flatnonzero(~np.isin(a.keys, b.keys) & np.isin(a.texts, b.texts)) for a, b in ((one, other), (other, one))
    ]
    if not all(map(len, left)):
        return ""
    places: dict[tuple[bytes, int], int] = {}
    for position, (index, image) in zip(left[1], other.shown(left[1]), strict=True):
        places.setdefault((digest(image.prompt), index), int(position))
    found = [
        (index, image, places[key])
        for index, image in one.shown(left[0])
        if (key := (digest(image.prompt), index)) in places
    ]
    if not found:
        return ""
    theirs = [image.seed for _, image in other.shown([place for *_, place in found[:_SHOWN]])]
    first = ", ".join(
        f"{_quoted(image.prompt)}, image {index}: {image.seed} and {seed}"
        for (index, image, _), seed in zip(found, theirs, strict=False)
    )
    return f"{one.name} and {other.name} have other random seeds of {len(found)} images: {first}"


def _distinct(side: Side, positions: Positions) -> tuple[int, str]:
    """Returns the number of distinct prompts at some positions, and the first ones as text."""
    texts, first = np.unique(side.texts[positions], return_index=True)
    shown = side.shown(positions[np.sort(first)[:_SHOWN]])
    more = ", ..." if len(texts) > len(shown) else ""
    return len(texts), ", ".join(_quoted(image.prompt) for _, image in shown) + more


def counted(count: int, noun: str) -> str:
    """Returns `1 image` or `2 images`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _quoted(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
