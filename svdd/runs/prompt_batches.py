"""Batches of prompts, as the processes of a run and their data loaders take them."""

import signal
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch.utils.data import IterableDataset, get_worker_info

from svdd.runs.rows import Prompt

if TYPE_CHECKING:
    from svdd.runs.prompts import PromptDataset

__all__ = ["Handed", "Share", "ignore_signals"]


class Share(IterableDataset[list[Prompt]]):
    """One process's share of the unfinished prompts, in batches.

    It has no length: with one, Lightning would store the indices of all batches, and skip the hooks of a process
    without prompts, for which the others would wait.
    """

    def __init__(self, dataset: "PromptDataset", indices: "array[int]", batch_size: int) -> None:
        self._dataset, self._indices, self._batch_size = dataset, indices, batch_size
        self.num_prompts = len(indices)

    def __iter__(self) -> Iterator[list[Prompt]]:
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        for number in range(worker, -(-self.num_prompts // self._batch_size), workers):  # the loader asks them in turn
            start = number * self._batch_size
            yield [self._dataset[index] for index in self._indices[start : start + self._batch_size]]


class Handed(IterableDataset[list[Prompt]]):
    """Batches of prompts that are handed out one by one, to this process and to others.

    It has a length, so that Lightning fetches no batch ahead, which another process could draw meanwhile.
    """

    def __init__(
        self, dataset: "PromptDataset", hand: Callable[[], Sequence[int]], num_prompts: int, most: int
    ) -> None:
        self._dataset, self._hand, self._most = dataset, hand, most
        self.num_prompts = num_prompts

    def __len__(self) -> int:
        return self._most

    def __iter__(self) -> Iterator[list[Prompt]]:
        while batch := self._hand():
            yield [self._dataset[index] for index in batch]


def ignore_signals(worker: int) -> None:
    """Ignores signals sent to all processes: the main process ends its workers itself."""
    signal.set_wakeup_fd(-1)  # a forked process inherits the parent's
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
