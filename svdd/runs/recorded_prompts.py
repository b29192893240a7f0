"""The prompts with which an output folder was begun: a prompt file of their own, to which more may be appended."""

import json
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svdd.runs.config import read_config
from svdd.runs.files import regular_only, replacing

if TYPE_CHECKING:
    from svdd.runs.prompts import PromptDataset

__all__ = ["PROMPTS", "PromptChanges", "compare_prompts", "folder_of", "run_prompts_folder", "write_prompts"]

PROMPTS = "prompts.jsonl"
_SHOWN, _LEAD, _WIDTH = 3, 20, 60  # prompts in a message; characters of a text before its first difference, and in all


class PromptChanges(NamedTuple):
    """How given prompts differ from those that a folder records."""

    recorded: int  # prompts
    given: int
    differing: int  # of those that both have
    examples: tuple[str, ...] = ()  # the first of them, in words

    def __str__(self) -> str:
        """Says how they differ; empty if they do not."""
        found = []
        if self.differing:
            more = self.differing - len(self.examples)
            both = min(self.recorded, self.given)
            shown = "; ".join((*self.examples, *([f"and {more} more"] if more else [])))
            found.append(f"{self.differing} of the first {both} prompts differ ({shown})")
        if self.given != self.recorded:
            found.append(f"{self.recorded} prompts became {self.given}")
        return ", ".join(found)


def compare_prompts(folder: Path, prompts: "PromptDataset") -> PromptChanges | None:
    """Returns how prompts differ from the recorded ones; None if there is no record. Memory holds one of each."""
    differing = recorded = given = 0
    examples: list[str] = []
    try:
        with open(folder / PROMPTS, "rb", opener=regular_only) as file:
            for index, (old, new) in enumerate(zip_longest(file, prompts.records())):
                recorded, given = recorded + (old is not None), given + (new is not None)
                if old is not None and new is not None and old != new:
                    differing += 1
                    if len(examples) < _SHOWN:
                        examples.append(f"prompt {index}: {_difference(old, new)}")
    except FileNotFoundError:
        return None
    return PromptChanges(recorded, given, differing, tuple(examples))


def write_prompts(folder: Path, prompts: "PromptDataset") -> None:
    """Records prompts, in place of those recorded before."""
    with replacing(folder / PROMPTS) as file:
        file.writelines(prompts.records())


def folder_of(source: object) -> str | None:
    """Returns the folder to which relative paths in the columns of a source of prompts refer; None for a list.

    For the prompts that a run recorded, it is the folder of the file from which the run read them.
    """
    if not isinstance(source, str):
        return None
    path = Path(source).expanduser()
    return run_prompts_folder(path.parent) if path.name == PROMPTS else str(path.parent)


def run_prompts_folder(folder: Path) -> str | None:
    """Returns the folder to which relative paths in the columns of a run's prompts refer; see `folder_of`."""
    if (recorded := read_config(folder)) is None:
        return str(folder)
    data = recorded.config.get("data")
    source = data.get("prompts") if isinstance(data, dict) else None
    own = isinstance(source, str) and Path(source).expanduser().absolute() == (folder / PROMPTS).absolute()
    return str(folder) if own else folder_of(source)


def _difference(old: bytes, new: bytes) -> str:
    """Returns what differs between two records: the prompt alone, or else its other columns."""
    try:
        was, now = json.loads(old), json.loads(new)
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    except (ValueError, AttributeError, RecursionError):
        return "its record is damaged"
    shown = ["prompt"] if "prompt" in names else names[:_SHOWN]
    return ", ".join(
        " ".join(
            [*([] if name == "prompt" else [name]), "was {}, now {}".format(*_excerpts(was.get(name), now.get(name)))]
        )
        for name in shown
    )


def _excerpts(old: Any, new: Any) -> Iterable[str]:
    """Returns two values as text; of long ones, the part around the first difference."""
    texts = ["none" if value is None else repr(value) for value in (old, new)]
    if max(map(len, texts)) <= _WIDTH:
        return texts
    first = next((k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, first - _LEAD)
    return [
        f"{'...' * (start > 0)}{text[start : start + _WIDTH]}{'...' * (len(text) > start + _WIDTH)}" for text in texts
    ]
