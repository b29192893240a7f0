"""Which pictures of a run belong to which prompts of a benchmark."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from svdd import UserError
from svdd.evaluation.benchmarks.base import Entry
from svdd.runs.pictures import Picture

__all__ = ["Matched", "match"]

_SHOWN = 3  # prompts that a message names


@dataclass(frozen=True)
class Matched:
    """The pictures of a benchmark's prompts, in the order of the prompts.

    Attributes:
        pictures: Each with the index of its prompt among all entries.
        entries: That of each picture.
        notes: What is missing or left over, for the user.
    """

    pictures: list[Picture]
    entries: list[int]
    notes: list[str]


def match(entries: Sequence[Entry], pictures: Sequence[Picture], partial: bool) -> Matched:
    """Finds the pictures of each entry by the text of its prompt.

    If several entries have the same text, and the run has as many prompts with it, they are paired in order; else each
    of them has all pictures of that text.

    Raises:
        UserError: If no picture has one of the prompts; or unless `partial`, if prompts lack pictures.
    """
    drawn: dict[str, dict[int, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        drawn[picture.prompt][picture.prompt_index].append(picture)
    places: dict[str, list[int]] = defaultdict(list)
    for k, entry in enumerate(entries):
        places[entry.text].append(k)
    found: dict[int, list[Picture]] = {}
    for text, members in places.items():
        groups = [*drawn.get(text, {}).values()]
        paired = len(groups) == len(members)
        together = [picture for group in groups for picture in group]
        found.update((k, groups[j] if paired else together) for j, k in enumerate(members))
    if not any(found.values()):
        first = f"the first picture's is {pictures[0].prompt!r}, the benchmark's is {entries[0].text!r}"
        raise UserError(f"no picture has a prompt of the benchmark: {first}; draw its prompts")
    notes, counts = (
        [],
        {k: len({(picture.prompt_index, picture.image) for picture in group}) for k, group in found.items()},
    )
    most = max(counts.values())
    lacking = [entry.text for k, entry in enumerate(entries) if not counts[k]]
    fewer = [entry.text for k, entry in enumerate(entries) if 0 < counts[k] < most]
    if lacking:
        notes.append(f"{len(lacking)} of {len(entries)} prompts have no picture: {_some(lacking)}")
    if fewer:
        notes.append(f"{len(fewer)} prompts have fewer than {most} pictures: {_some(fewer)}")
    if notes and not partial:
        advice = "draw them (the run's command continues it), or measure what is there with --partial"
        raise UserError(f"{'; '.join(notes)}; {advice}")
    if spare := sum(picture.prompt not in places for picture in pictures):
        notes.append(f"{spare} of {len(pictures)} pictures have other prompts and are left out")
    pairs = [(picture, k) for k in range(len(entries)) for picture in found[k]]
    return Matched([picture for picture, _ in pairs], [k for _, k in pairs], notes)


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text) for text in texts[:_SHOWN])
    return f"{shown} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else shown
