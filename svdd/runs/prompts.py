"""Prompts: read and checked in one pass before any model work, then served in batches."""

import hashlib
import json
import mmap
import os
import stat
import tempfile
from array import array
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import Any, cast

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from svdd import check_bound, require_at_least
from svdd.runs.bounds import MAX_WORKERS
from svdd.runs.prompt_batches import Handed, Share, ignore_signals
from svdd.runs.prompt_files import open_source
from svdd.runs.prompt_rows import PromptError, RowReader, key, located, shorten
from svdd.runs.recorded_prompts import folder_of
from svdd.runs.rows import Prompt

__all__ = ["Prompt", "PromptDataModule", "PromptDataset", "PromptError", "PromptWarning", "keeping_prompts"]

_kept: "dict[Hashable, PromptDataset] | None" = None


@contextmanager
def keeping_prompts() -> Iterator[None]:
    """Reads a file only once for all data modules of this block, as long as it stays the same."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        for dataset in _kept.values():
            dataset.close()
        _kept = before


class PromptWarning(UserWarning):
    """What should be known about a source that can be used."""


class PromptDataset(Dataset[Prompt]):
    """The prompts of a source, checked in one pass; see `PromptDataModule`. Raises a PromptError if it cannot be used.

    They lie in an unnamed temporary file, which even a killed process does not leave behind, and memory holds eight
    bytes a prompt. Threads and other processes may read too. `digest` is the SHA-256 of all prompts and their columns,
    `folder` that to which relative paths in columns refer, or None for the working directory.
    """

    def __init__(
        self,
        prompts: Sequence[str] | str,
        prompt_column: str = "prompt",
        limit: int | None = None,
        max_prompt_length: int = 2000,
    ) -> None:
        reader = RowReader(prompt_column, max_prompt_length)
        name, rows = open_source(prompts, reader)
        self.folder, self._name = folder_of(prompts), name
        self._source = (prompts, prompt_column, max_prompt_length) if isinstance(prompts, str) else None
        self._ends = array("Q", [0])  # record i is the bytes ends[i] .. ends[i + 1]
        num_blank, first_blank, digest = 0, "", hashlib.sha256()
        with located(name), _spool() as file:
            for place, row in rows:
                record = reader.record(place, row)
                if record is None:
                    num_blank += 1
                    first_blank = first_blank or place
                    continue
                file.write(record)
                digest.update(record)
                self._ends.append(self._ends[-1] + len(record))
                if len(self) == limit:
                    break
            if not len(self):
                blank = f" ({num_blank} blank)" if num_blank else ""
                raise PromptError(f"holds no prompt{blank}, expected at least one")
            file.flush()
            self._content: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.digest = digest.hexdigest()
        if num_blank:
            count = f"{num_blank} blank prompts" if num_blank > 1 else "a blank prompt"
            reader.note(f"skipped {count}, the first at {first_blank}")
        for note in reader.notes():
            rank_zero_warn(f"{name}: {note}", category=PromptWarning)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]
        extra = json.loads(self._record(index))
        known = (extra.pop("prompt"), extra.pop("negative_prompt", None), extra.pop("seed", None))
        return Prompt(index, *known, extra, self.folder)

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(len(self)))

    def place(self, index: int) -> str:
        """Returns where a prompt stands, such as "prompts.csv: line 3", for a message; reads the source again."""
        if self._source is not None:
            with suppress(PromptError, OSError):
                source, prompt_column, max_length = self._source
                reader = RowReader(prompt_column, max_length)
                found = (place for place, row in open_source(source, reader)[1] if reader.record(place, row))
                return f"{self._name}: {next(islice(found, index, None), f'prompt {index}')}"
        return f"{self._name}: prompt {index}"

    def records(self) -> Iterator[bytes]:
        """Yields each prompt with its columns as a line of JSON, as in a prompt file."""
        return map(self._record, range(len(self)))

    def _record(self, index: int) -> bytes:
        return self._content[self._ends[index] : self._ends[index + 1]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": self._content[:]}

    def close(self) -> None:
        """Frees the prompts, which cannot be read afterwards."""
        if isinstance(self._content, mmap.mmap):
            self._content.close()


@contextmanager
def _spool() -> Iterator[Any]:
    """An unnamed temporary file; an error of it, or of the file that is read, becomes a PromptError."""
    try:
        with tempfile.TemporaryFile(prefix="svdd-") as file:
            yield file
    except OSError as error:
        what = f"cannot be read, or copied to the temporary folder (TMPDIR): {error.strerror or error}"
        raise PromptError(what) from None


class PromptDataModule(LightningDataModule):
    """Prompts from a list or a file, in batches, in order, each exactly once.

    The whole source is checked before the first image is made. Blank prompts are skipped with one warning.

    Args:
        prompts: A list of prompts, `emoji` (a list that ships with svdd), or a file: .txt (one prompt a line), .csv or
            .tsv (with a header row), .json (an array), .jsonl (one JSON value a line) or .parquet (needs `pip install
            'svdd[parquet]'`). JSON items are strings or objects. Optional columns (or JSON keys) are `negative_prompt`
            and `seed`; all others are copied into the results. Text is UTF-8, or has a byte-order mark. All but .json
            are read in constant memory. A single prompt is written as a list, '["a red apple"]'.
        batch_size: Number of prompts handed to the sampler at once, on each device.
        num_workers: Number of processes that read prompts; 0 reads them in the main process, which is fast enough.
        prompt_column: Name of the column, or JSON key, that holds the prompt. Without a column `prompt`, it may also be
            called `prompts`, `text` or `caption`. Case, spaces, underscores and hyphens in names do not count.
        limit: Use only the first prompts, at most this many; what follows them is not even checked. Default: all.
        max_prompt_length: Longest prompt accepted, in characters; a longer one is an error.

    Attributes:
        hand: Set it to let `hand()` choose the next batch of indices, until one is empty; None draws all in order.

    Raises:
        ValueError: If an argument is out of range; a TypeError if `prompts` is neither a list nor a path.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        batch_size: int = 4,
        num_workers: int = 0,
        prompt_column: str = "prompt",
        limit: int | None = None,
        max_prompt_length: int = 2000,
    ) -> None:
        super().__init__()
        if isinstance(prompts, os.PathLike):
            prompts = os.fspath(prompts)
        if not isinstance(prompts, str | list | tuple):
            raise TypeError(f"prompts must be a list of strings or the path of a file, got {shorten.repr(prompts)}")
        numbers = {"batch_size": batch_size, "limit": limit, "max_prompt_length": max_prompt_length}
        for name, number in {**numbers, "num_workers": num_workers}.items():
            least = 0 if name == "num_workers" else 1
            if number is not None:
                require_at_least(least, **{name: number})
        check_bound("num_workers", num_workers, MAX_WORKERS, "0 is fast enough")
        if key(prompt_column) in map(key, ("negative_prompt", "seed")):
            raise ValueError(f"prompt_column must name the column of the prompts, got {prompt_column!r}")
        self.prompts, self.prompt_column, self.limit = prompts, prompt_column, limit
        self.batch_size, self.num_workers, self.max_prompt_length = batch_size, num_workers, max_prompt_length
        self.hand: Callable[[], Sequence[int]] | None = None

    @property
    def unfinished(self) -> list[int]:
        """The indices of the prompts that are not skipped."""
        return [index for index in range(len(self.dataset)) if not self._finished[index]]

    @cached_property
    def dataset(self) -> PromptDataset:
        """The prompts, read on first use, the skipped ones included; raises a PromptError if they cannot be used."""
        arguments = (self.prompts, self.prompt_column, self.limit, self.max_prompt_length)
        if _kept is None or (version := _version(self.prompts)) is None:
            dataset = PromptDataset(*arguments)
        else:
            key = (*arguments, version)
            if key not in _kept:
                _kept[key] = PromptDataset(*arguments)
            dataset = _kept[key]
        self._finished = bytearray(len(dataset))  # one flag a prompt
        return dataset

    def adopt(self, other: "PromptDataModule") -> None:
        """Takes the prompts that another has read from the same source, which may have changed since."""
        self.dataset, self._finished = other.dataset, bytearray(len(other.dataset))

    def setup(self, stage: str = "predict") -> None:
        """Reads and checks the source, unless that is already done."""
        self.dataset  # noqa: B018

    def teardown(self, stage: str = "predict") -> None:
        """Frees the prompts and forgets which were skipped; the next use reads the source again."""
        if "dataset" in self.__dict__:
            if not any(self.dataset is each for each in (_kept or {}).values()):
                self.dataset.close()
            del self.dataset

    def skip(self, indices: Collection[int]) -> None:
        """Leaves finished prompts out of the loader; the others keep their index. Calls add up until `teardown`.

        Indices past the end are ignored. With several processes, those that rank 0 skips count for all.
        """
        num_prompts = len(self.dataset)
        for index in indices:
            if index < 0:
                raise ValueError(f"indices of prompts must be >= 0, got {index}")
            if index < num_prompts:
                self._finished[index] = 1

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Returns a loader of `list[Prompt]`: this process's share of the prompts that are not skipped, in order.

        Shares differ by one prompt at most. Raises a PromptError if the prompts differ between the processes.
        """
        dataset, finished, trainer = self.dataset, self._finished, self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        if trainer is not None and world_size > 1 and distributed.is_available() and distributed.is_initialized():
            digest, finished = trainer.strategy.broadcast((dataset.digest, finished))
            if digest != dataset.digest:
                what = f"the prompts of process {rank} differ from those of process 0"
                raise PromptError(f"{what}; give every node the same file")
        if not finished.count(0):  # seen by every process; Lightning then leaves the loop out
            return DataLoader(dataset=cast(Any, ()), batch_size=None)
        unfinished = (index for index, flag in enumerate(finished) if not flag)
        if self.hand is not None:
            left = finished.count(0)
            handed = Handed(dataset, self.hand, left, -(-left // self.batch_size))
            return DataLoader(dataset=cast(Any, handed), batch_size=None)
        share = Share(dataset, array("Q", islice(unfinished, rank, None, world_size)), self.batch_size)
        start = ignore_signals if self.num_workers else None
        return DataLoader(dataset=cast(Any, share), batch_size=None, num_workers=self.num_workers, worker_init_fn=start)

    test_dataloader = predict_dataloader  # a calibration is a test loop


def _version(source: Sequence[str] | str) -> Hashable:
    """Returns what changes when a file does; None for other sources."""
    with suppress(OSError, ValueError):
        if isinstance(source, str) and stat.S_ISREG((found := os.stat(os.path.expanduser(source))).st_mode):
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None
