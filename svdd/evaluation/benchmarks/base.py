"""What all benchmarks share: prompts with what the benchmark says about them, and judgements of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from svdd import UserError, did_you_mean
from svdd.rewards.base import Reward
from svdd.runs.bounds import MAX_LINE
from svdd.runs.prompts import PromptDataset

__all__ = ["Benchmark", "Entry", "Judgement"]


@dataclass(frozen=True)
class Entry:
    """A prompt of a benchmark.

    Attributes:
        text: The prompt.
        category: The task, or whatever the benchmark reports separately.
        extra: All other columns of the prompt file.
        folder: That to which relative paths in columns refer.
    """

    text: str
    category: str
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    folder: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What a benchmark says about a picture.

    Attributes:
        scores: A number by category; usually one, that of the prompt's own.
        details: What else is recorded about the picture, as JSON data.
        weights: How often a category's number counts, such as the number of questions whose mean it is; else once.
    """

    scores: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


class Benchmark(nn.Module, ABC):
    """A public benchmark: its prompt file, and how a picture is judged.

    Attributes:
        metric: Name of the benchmark's own number; empty if it has none, and only rewards are measured.
        proportion: Whether that number is 0 or 1 for each picture.
        size: Number of prompts of the public file.
        whole: Category of the overall number, if `judge` gives it; else that is the mean over the categories.
        overall: Whether there is an overall number.
        known: Categories of the public file, in the order of the report; others follow.
    """

    metric: ClassVar[str] = ""
    proportion: ClassVar[bool] = False
    size: ClassVar[int]
    whole: ClassVar[str] = ""
    overall: ClassVar[bool] = True
    known: ClassVar[tuple[str, ...]] = ()
    category_column: ClassVar[str] = "category"

    def read(self, source: str) -> list[Entry]:
        """Returns the prompts of a file, by default one that `data.prompts` can be too, with a column for the category.

        Raises:
            UserError: If the file cannot be read, or `check` refuses a prompt.
        """
        entries = []
        with closing(PromptDataset(source, max_prompt_length=MAX_LINE)) as dataset:
            for prompt in (dataset[k] for k in range(len(dataset))):
                names = {name.lower(): name for name in prompt.extra}
                category = prompt.extra.get(names.get(self.category_column, ""))
                if not isinstance(category, str):
                    found = f"the prompt {prompt.text!r} has no {self.category_column}"
                    hint = did_you_mean(self.category_column, names)
                    raise UserError(f"{source}: {found}; {self._expected()}{hint}")
                entries.append(Entry(prompt.text, category.strip(), prompt.extra, prompt.folder))
                if problem := self.fault(entries[-1]):
                    raise UserError(f"{source}: the prompt {prompt.text!r} {problem}; {self._expected()}")
        return entries

    def _expected(self) -> str:
        return f"expected the public prompt file of {type(self).__name__}"

    def fault(self, entry: Entry) -> str:
        """Returns what is wrong with a prompt and its columns; empty if nothing is."""
        return ""

    def default_rewards(self) -> list[Reward]:
        """Returns the rewards that are measured if none are given."""
        return []

    def load(self) -> None:
        """Loads all weights now."""
        for module in self.modules():
            if isinstance(module, Reward):
                module.load()

    @abstractmethod
    def judge(self, images: Tensor, entries: Sequence[Entry]) -> list[Judgement]:
        """Returns a judgement of each image, float32 [n, 3, h, w] in [0, 1], under its own prompt."""
