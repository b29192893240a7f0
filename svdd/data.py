"""Prompts: read, checked and spooled in one pass before any model work, then served in batches."""

import csv
import difflib
import itertools
import json
import math
import mmap
import os
import re
import reprlib
import tempfile
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import context, reduction
from typing import IO, Any, NamedTuple

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Subset

from svdd.errors import UserError

__all__ = ["Prompt", "PromptDataModule", "PromptDataset", "PromptError"]

_MAX_LINE = 2**24  # characters; a longer line means a binary file
_MAX_SEED = 2**63 - 1
_RESERVED = {"prompt", "prompt_index", "image_index", "file", "rewards", "ledger", "sha256"}
_UNDECODED = re.compile(r"[\x00\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_BREAKS = re.compile(r"[\t\r\n\u2028\u2029]+")
_CSV_SEED = re.compile(r"[0-9]{1,19}")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60


class PromptError(UserError):
    """A prompt source that cannot be used; the message is one line and names the file and the place in it."""


class Prompt(NamedTuple):
    """One prompt and what its source says about it.

    Attributes:
        index: Position in the source, from 0, counting the prompts that were kept.
        text: The prompt, on one line.
        negative_prompt: What the image should not show; None where the source gives none.
        seed: The seed of the prompt's first image; None where the source gives none.
        extra: All other columns of the source, carried into the results.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    text: str
    negative_prompt: str | None
    seed: int | None
    extra: dict[str, Any]


_Row = tuple[str, Any]  # a place such as "line 3", and what stands there: a prompt, or a dict of columns


def _check_decoded(text: str, first_line: int) -> None:
    """Refuse bytes that are not UTF-8 (they arrive as lone surrogates) and NUL, which UTF-16 is full of."""
    match = _UNDECODED.search(text)
    if match is not None:
        line = first_line + text.count("\n", 0, match.start())
        byte = ord(match.group()) & 0xFF
        looks = ", this looks like UTF-16 or a binary file" if byte in (0x00, 0xFE, 0xFF) else ""
        raise PromptError(f"line {line}: byte 0x{byte:02x} is not UTF-8 text{looks}; save the file as UTF-8")


def _read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends (LF, CRLF or CR), one in memory at a time."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE)
            if not line:
                return
            _check_decoded(line, number)
            if len(line) == _MAX_LINE:
                raise PromptError(f"line {number}: is longer than {_MAX_LINE} characters; is this a text file?")
            yield line


def _parse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value, use null")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{_shorten.repr(digits)} is too large a number")
    return value


def _parse_json(text: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_parse_constant, parse_float=_parse_float)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise PromptError(f"line {line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"line {line}: not valid JSON: {error}") from None


def _read_txt(path: str, prompt_column: str) -> Iterator[_Row]:
    for number, line in enumerate(_read_lines(path), 1):
        yield f"line {number}", line


def _read_jsonl(path: str, prompt_column: str) -> Iterator[_Row]:
    for number, line in enumerate(_read_lines(path), 1):
        yield f"line {number}", _parse_json(line, number) if line.strip() else ""


def _read_json(path: str, prompt_column: str) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    _check_decoded(text, 1)
    items = _parse_json(text, 1) if text.strip() else []
    if isinstance(items, dict) and items.keys() == {"prompts"}:
        items = items["prompts"]
    if not isinstance(items, list):
        raise PromptError(f'expected an array of prompts or {{"prompts": [...]}}, got {_shorten.repr(items)}')
    yield from _read_list(items)


def _read_list(items: Sequence[Any]) -> Iterator[_Row]:
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _read_table(path: str, prompt_column: str, delimiter: str) -> Iterator[_Row]:
    reader = csv.reader(_read_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"  # where the row starts: a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise PromptError(f"{place}: malformed row: {error}; check the quotes") from None
        if fields is None:
            return
        if not fields:
            if header is not None:
                yield place, ""
        elif header is None:
            header = [name.strip() for name in fields]
            _check_header(header, prompt_column, place)
        elif len(fields) != len(header):
            kind = "tab" if delimiter == "\t" else "comma"
            raise PromptError(
                f"{place}: expected {len(header)} fields as in the header, got {len(fields)};"
                f' put "quotes" around a field that holds a {kind}'
            )
        else:
            row: dict[str, Any] = dict(zip(header, fields, strict=True))
            seed = row.get("seed", "").strip()
            if not seed:
                row.pop("seed", None)
            elif _CSV_SEED.fullmatch(seed):
                row["seed"] = int(seed)
            yield place, row


def _read_parquet(path: str, prompt_column: str) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptError("reading parquet needs pyarrow, which is missing: pip install 'svdd[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, prompt_column, "schema")
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise PromptError(f"not a readable parquet file: {reason}") from None


_READERS: dict[str, Callable[[str, str], Iterator[_Row]]] = {
    ".txt": _read_txt,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _check_columns(columns: Collection[str], prompt_column: str) -> None:
    if prompt_column not in columns:
        folded = {name.casefold(): name for name in columns}
        near = difflib.get_close_matches(prompt_column.casefold(), folded, n=1)
        shown = ", ".join(map(_shorten.repr, itertools.islice(columns, 20))) or "none"
        more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
        hint = f", did you mean {folded[near[0]]!r}?" if near else ""
        raise PromptError(
            f"no column {prompt_column!r} among the columns {shown}{more}{hint};"
            " say with prompt_column which one holds the prompts"
        )
    taken = sorted(_RESERVED.intersection(columns) - {prompt_column})
    if taken:
        raise PromptError(f"column {taken[0]!r} has the name of a result that svdd writes itself; rename the column")


def _check_header(header: list[str], prompt_column: str, place: str) -> None:
    try:
        _check_columns(header, prompt_column)
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from None
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise PromptError(f"{place}: column {repeated!r} appears more than once; rename one of them")


def _clean(value: Any, column: str, max_length: int) -> str:
    """Check a text and put it on one line; a missing value is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"{column} must be a string, got {_shorten.repr(value)}")
    control = _CONTROL.search(value)
    if control is not None:
        code = ord(control.group())
        raise PromptError(
            f"{column} holds the control character U+{code:04X} at character {control.start() + 1}; remove it"
        )
    text = _BREAKS.sub(" ", value).strip()
    if len(text) > max_length:
        raise PromptError(
            f"{column} has {len(text)} characters, expected at most {max_length}; shorten it or raise max_prompt_length"
        )
    return text


def _to_record(row: Any, prompt_column: str, max_length: int) -> bytes | None:
    """Check one row and write it as a line of JSON, `[text, negative_prompt, seed, extra]`; None for a blank prompt."""
    if isinstance(row, str):
        row = {prompt_column: row}
    if not isinstance(row, dict):
        raise PromptError(f"expected a prompt as a string or an object, got {_shorten.repr(row)}")
    _check_columns(row, prompt_column)
    extra = dict(row)
    text = _clean(extra.pop(prompt_column), prompt_column, max_length)
    negative_prompt = _clean(extra.pop("negative_prompt", None), "negative_prompt", max_length) or None
    seed = extra.pop("seed", None)
    if seed is not None and (type(seed) is not int or not 0 <= seed <= _MAX_SEED):
        raise PromptError(f"seed must be an integer from 0 to 2**63 - 1 or empty, got {_shorten.repr(seed)}")
    if not text:
        return None
    try:
        line = json.dumps([text, negative_prompt, seed, extra], ensure_ascii=False, allow_nan=False)
        return line.encode() + b"\n"
    except UnicodeEncodeError:
        raise PromptError("holds half of a surrogate pair, from a broken \\u escape or a wrong encoding") from None
    except (TypeError, ValueError) as error:
        raise PromptError(f"a column cannot be carried into the results as JSON: {error}") from None


def _open_source(prompts: Sequence[str] | str, prompt_column: str) -> tuple[str, Iterator[_Row]]:
    """Return a source's name for messages and its rows, none of them read yet."""
    if not isinstance(prompts, str):
        return "prompts", _read_list(prompts)
    name = prompts if prompts.isprintable() else _shorten.repr(prompts)
    path = os.path.expanduser(prompts)
    suffixes = ", ".join(_READERS)
    if os.path.isdir(path):
        raise PromptError(f"{name}: is a directory, expected a file ending in one of {suffixes}")
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        if os.path.exists(path):
            raise PromptError(f"{name}: unknown kind of file, expected a name ending in one of {suffixes}")
        raise PromptError(
            f"prompts must be a list of prompts or a file ending in one of {suffixes}, got {_shorten.repr(prompts)};"
            ' write a single prompt as a list: ["a red apple"]'
        )
    try:
        with open(path, "rb"):
            return name, reader(path, prompt_column)
    except FileNotFoundError:
        raise PromptError(f"{name}: no such file, seen from {os.getcwd()}; check the path") from None
    except (OSError, ValueError) as error:
        raise PromptError(f"{name}: cannot be read: {error}") from None


def _new_spool() -> IO[bytes]:
    """Open a temporary file that has no name and goes when its last descriptor is closed."""
    return tempfile.TemporaryFile(prefix="svdd-")


class PromptDataset(Dataset[Prompt]):
    """The prompts of a source, checked in one pass and kept in an unnamed temporary file.

    Memory holds eight bytes a prompt, whatever their length. Reading is safe from threads, forked and spawned
    processes. The file has no name, so nothing is left behind even by a killed process.

    Args:
        prompts: A list of prompts, or the path of a file of prompts; see `PromptDataModule`.
        prompt_column: Name of the column, or JSON key, that holds the prompt.
        limit: Keep the first prompts only, at most this many; what follows them is not read.
        max_prompt_length: Longest prompt accepted, in characters.

    Raises:
        PromptError: If the source cannot be read, holds no prompt or holds anything that cannot be used.
    """

    def __init__(
        self,
        prompts: Sequence[str] | str,
        prompt_column: str = "prompt",
        limit: int | None = None,
        max_prompt_length: int = 2000,
    ) -> None:
        name, rows = _open_source(prompts, prompt_column)
        self._ends = array("Q", [0])  # line i of the spool is the bytes ends[i] .. ends[i + 1]
        self._hold(_new_spool())
        try:
            self._fill(rows, name, prompt_column, limit, max_prompt_length)
        except PromptError as error:
            self.close()
            raise PromptError(f"{name}: {error}") from None
        except BaseException:
            self.close()
            raise

    def _hold(self, spool: IO[bytes]) -> None:
        self._spool = spool
        weakref.finalize(self, spool.close)

    def _fill(
        self, rows: Iterable[_Row], name: str, prompt_column: str, limit: int | None, max_prompt_length: int
    ) -> None:
        num_blank, first_blank = 0, ""
        for place, row in rows:
            try:
                record = _to_record(row, prompt_column, max_prompt_length)
            except PromptError as error:
                raise PromptError(f"{place}: {error}") from None
            if record is None:
                num_blank += 1
                first_blank = first_blank or place
                continue
            self._spool.write(record)
            self._ends.append(self._ends[-1] + len(record))
            if len(self) == limit:
                break
        self._spool.flush()
        if not len(self):
            blank = f" ({num_blank} blank)" if num_blank else ""
            raise PromptError(f"holds no prompt{blank}, expected at least one")
        if num_blank:
            count = f"{num_blank} blank prompts" if num_blank > 1 else "a blank prompt"
            rank_zero_warn(f"{name}: skipped {count}, the first at {first_blank}")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]
        start, end = self._ends[index], self._ends[index + 1]
        text, negative_prompt, seed, extra = json.loads(os.pread(self._spool.fileno(), end - start, start))
        return Prompt(index, text, negative_prompt, seed, extra)

    def __getstate__(self) -> dict[str, Any]:
        descriptor = self._spool.fileno()
        if context.get_spawning_popen() is not None:  # a process is being started: it inherits the file itself
            return {**self.__dict__, "_spool": reduction.DupFd(descriptor)}
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            return {**self.__dict__, "_spool": content.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["_spool"], bytes):
            self._hold(_new_spool())
            self._spool.write(state["_spool"])
            self._spool.flush()
        else:
            self._hold(os.fdopen(state["_spool"].detach(), "rb"))

    def close(self) -> None:
        """Remove the spool; the prompts cannot be read afterwards."""
        self._spool.close()


class PromptDataModule(LightningDataModule):
    """Prompts from a list or a file, in batches, in order, each exactly once.

    The whole source is checked before the first image is made. Blank prompts are skipped with one warning.

    Args:
        prompts: A list of prompts, or a file: .txt (one prompt a line), .csv or .tsv (with a header row), .json (an
            array), .jsonl (one JSON value a line) or .parquet (needs `pip install 'svdd[parquet]'`). JSON items are
            strings or objects. Optional columns (or JSON keys) are `negative_prompt` and `seed`; all others are copied
            into the results. Files are UTF-8. Any size is read in constant memory, except .json, which is read whole:
            use .jsonl for very large sets. A single prompt is written as a list, '["a red apple"]'.
        batch_size: Number of prompts handed to the sampler at once, on each device.
        num_workers: Number of processes that read prompts; 0 reads them in the main process, which is fast enough.
        prompt_column: Name of the column, or JSON key, that holds the prompt.
        limit: Use only the first prompts, at most this many; what follows them is not even checked. Default: all.
        max_prompt_length: Longest prompt accepted, in characters; a longer one is an error.

    Raises:
        ValueError: If a number is out of range or `prompt_column` is a column with another meaning.
        TypeError: If `prompts` is neither a list nor a path.
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
        if not isinstance(prompts, (str, list, tuple)):
            raise TypeError(f"prompts must be a list of strings or the path of a file, got {_shorten.repr(prompts)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be >= 0, got {num_workers}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        if max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be >= 1, got {max_prompt_length}")
        if prompt_column in ("negative_prompt", "seed"):
            raise ValueError(f"prompt_column must name the column of the prompts, got {prompt_column!r}")
        self.prompts = prompts
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prompt_column = prompt_column
        self.limit = limit
        self.max_prompt_length = max_prompt_length
        self._dataset: PromptDataset | None = None
        self._finished = bytearray()  # one flag a prompt

    def setup(self, stage: str = "predict") -> None:
        """Read and check the source, unless that is already done.

        Args:
            stage: Lightning's name of what is about to run; the prompts are the same for all.

        Raises:
            PromptError: If the source cannot be used.
        """
        if self._dataset is None:
            self._dataset = PromptDataset(self.prompts, self.prompt_column, self.limit, self.max_prompt_length)
            self._finished = bytearray(len(self._dataset))

    def teardown(self, stage: str = "predict") -> None:
        """Remove the spool and forget what was skipped; `setup` reads the source anew.

        Args:
            stage: Lightning's name of what has run.
        """
        if self._dataset is not None:
            self._dataset.close()
            self._dataset = None

    def _ready(self) -> PromptDataset:
        self.setup()
        assert self._dataset is not None
        return self._dataset

    @property
    def num_prompts(self) -> int:
        """Number of prompts in the source (at most `limit`), the skipped ones included."""
        return len(self._ready())

    def skip(self, indices: Collection[int]) -> None:
        """Leave finished prompts out of the loader; the others keep their index. Calls add up until `teardown`.

        Args:
            indices: Values of `Prompt.index`, the same in every process; those past the end are ignored.

        Raises:
            ValueError: If an index is negative.
        """
        num_prompts = self.num_prompts
        for index in indices:
            if index < 0:
                raise ValueError(f"indices of prompts must be >= 0, got {index}")
            if index < num_prompts:
                self._finished[index] = 1

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Return a loader of `list[Prompt]`, in order, without the skipped prompts.

        Raises:
            PromptError: If the source cannot be used, or some but not all processes would get no prompt.
        """
        dataset: Dataset[Prompt] = self._ready()
        remaining = self._finished.count(0)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        if 0 < remaining < world_size:
            raise PromptError(
                f"each of the {world_size} processes needs a prompt, but {remaining} of {self.num_prompts} remain"
                f" to be done; use at most {remaining} device{'s' if remaining > 1 else ''}"
            )
        if remaining < self.num_prompts:
            dataset = Subset(dataset, array("Q", (i for i, done in enumerate(self._finished) if not done)))
        # By keyword, all of it: Lightning builds the loader anew with its own sampler and trips over positions.
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=list)
