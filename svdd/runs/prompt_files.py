"""Reads prompts out of lists and files, and says by line what is wrong with them."""

import csv
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from svdd import UserError, did_you_mean
from svdd.runs.rows import RESERVED_COLUMNS

__all__ = ["PromptError", "Row", "located", "open_source", "shorten", "to_record"]

_MAX_LINE = 2**24  # characters; a longer line means a binary file
_UNDECODED = re.compile(r"[\x00\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_BREAKS = re.compile(r"[\t\r\n\u2028\u2029]+")
_CSV_SEED = re.compile(r"[0-9]{1,19}")

Row = tuple[str, Any]  # a place such as "line 3", and what stands there: a prompt, or a dict of columns

shorten = reprlib.Repr()
shorten.maxstring = shorten.maxother = shorten.maxlong = 60


class PromptError(UserError):
    """A prompt source that cannot be used; the message is one line and names the file and the place in it."""


@contextmanager
def located(place: str) -> Iterator[None]:
    """Puts a place in front of the message of a PromptError."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from None


def _check_decoded(text: str, first_line: int) -> None:
    """Refuses bytes that are not UTF-8 (they arrive as lone surrogates) and NUL, which UTF-16 is full of."""
    if (match := _UNDECODED.search(text)) is not None:
        line = first_line + text.count("\n", 0, match.start())
        byte = ord(match.group()) & 0xFF
        looks = ", this looks like UTF-16 or a binary file" if byte in (0x00, 0xFE, 0xFF) else ""
        raise PromptError(f"line {line}: byte 0x{byte:02x} is not UTF-8 text{looks}; save the file as UTF-8")


def _read_lines(path: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends (LF, CRLF or CR), one in memory at a time."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(iter(partial(file.readline, _MAX_LINE), ""), 1):
            _check_decoded(line, number)
            if len(line) == _MAX_LINE:
                raise PromptError(f"line {number}: is longer than {_MAX_LINE} characters; is this a text file?")
            yield line


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shorten.repr(digits)} is not a finite number, use null")
    return value


def _parse_json(text: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}"
        raise PromptError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"line {line}: not valid JSON: {error}") from None


def _numbered(items: Iterable[Any], place: str = "item") -> Iterator[Row]:
    return ((f"{place} {number}", item) for number, item in enumerate(items, 1))


def _read_txt(path: str, prompt_column: str) -> Iterator[Row]:
    return _numbered(_read_lines(path), "line")


def _read_jsonl(path: str, prompt_column: str) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), 1):
        yield f"line {number}", _parse_json(line.rstrip(), number) if line.strip() else ""


def _read_json(path: str, prompt_column: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    _check_decoded(text, 1)
    items = _parse_json(text, 1) if text.strip() else []
    if isinstance(items, dict) and items.keys() == {"prompts"}:
        items = items["prompts"]
    if not isinstance(items, list):
        raise PromptError(f'expected an array of prompts or {{"prompts": [...]}}, got {shorten.repr(items)}')
    yield from _numbered(items)


def _read_table(path: str, prompt_column: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(_read_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"  # where the row starts: a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise PromptError(f"{place}: malformed row: {error}; check the quotes") from None
        if fields is None:
            return
        if not fields:
            if header:
                yield place, ""
        elif not header:
            header = [name.strip() for name in fields]
            with located(place):
                _check_columns(header, prompt_column)
        elif len(fields) != len(header):
            kind = "tab" if delimiter == "\t" else "comma"
            what = f"{place}: expected {len(header)} fields as in the header, got {len(fields)}"
            raise PromptError(f'{what}; put "quotes" around a field that holds a {kind}')
        else:
            row: dict[str, Any] = dict(zip(header, fields, strict=True))
            seed = row.pop("seed", "").strip()
            if seed:
                row["seed"] = int(seed) if _CSV_SEED.fullmatch(seed) else seed
            yield place, row


def _read_parquet(path: str, prompt_column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptError("reading parquet needs pyarrow, which is missing: pip install 'svdd[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            with located("schema"):
                _check_columns(file.schema_arrow.names, prompt_column)
            yield from _numbered((row for part in file.iter_batches(256) for row in part.to_pylist()), "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"not a readable parquet file: {' '.join(str(error).split())}") from None


_READERS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _check_columns(columns: list[str], prompt_column: str) -> None:
    if prompt_column not in columns:
        shown = ", ".join(map(shorten.repr, columns[:20])) or "none"
        more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
        what = f"no column {prompt_column!r} among the columns {shown}{more}"
        hint = did_you_mean(prompt_column, columns, ", ")
        raise PromptError(f"{what}{hint}; say with prompt_column which one holds the prompts")
    if taken := sorted(RESERVED_COLUMNS.intersection(columns) - {prompt_column}):
        raise PromptError(f"column {taken[0]!r} has the name of a result that svdd writes itself; rename the column")
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise PromptError(f"column {repeated[0]!r} appears more than once; rename one of them")


def _clean(value: Any, column: str, max_length: int) -> str:
    """Checks a text and puts it on one line; a missing value is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"{column} must be a string, got {shorten.repr(value)}")
    if (control := _CONTROL.search(value)) is not None:
        which = f"U+{ord(control.group()):04X} at character {control.start() + 1}"
        raise PromptError(f"{column} holds the control character {which}; remove it")
    text = _BREAKS.sub(" ", value).strip()
    if len(text) > max_length:
        what = f"{column} has {len(text)} characters, expected at most {max_length}"
        raise PromptError(f"{what}; shorten it or raise max_prompt_length")
    return text


def to_record(row: Any, prompt_column: str, max_length: int) -> bytes | None:
    """Checks a row and returns it as a line of JSON, `[text, negative_prompt, seed, extra]`; None if it is blank."""
    if isinstance(row, str):
        row = {prompt_column: row}
    if not isinstance(row, dict):
        raise PromptError(f"expected a prompt as a string or an object, got {shorten.repr(row)}")
    _check_columns(list(row), prompt_column)
    extra = dict(row)
    text = _clean(extra.pop(prompt_column), prompt_column, max_length)
    negative_prompt = _clean(extra.pop("negative_prompt", None), "negative_prompt", max_length) or None
    seed = extra.pop("seed", None)
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise PromptError(f"seed must be an integer from 0 to 2**63 - 1 or empty, got {shorten.repr(seed)}")
    if not text:
        return None
    try:
        return json.dumps([text, negative_prompt, seed, extra], ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise PromptError("holds half of a surrogate pair, from a broken \\u escape or a wrong encoding") from None
    except (TypeError, ValueError) as error:
        raise PromptError(f"a column cannot be carried into the results as JSON: {error}") from None


def open_source(prompts: Sequence[str] | str, prompt_column: str) -> tuple[str, Iterator[Row]]:
    """Returns a source's name for messages and its rows, none of them read yet."""
    if not isinstance(prompts, str):
        return "prompts", _numbered(prompts)
    name = prompts if prompts.isprintable() else shorten.repr(prompts)
    path = os.path.expanduser(prompts)
    if prompts == "emoji" and not os.path.exists(path):  # the list that ships with svdd
        path = str(files("svdd") / "assets" / "emoji_prompts.txt")
    suffixes = ", ".join(_READERS)
    if os.path.isdir(path):
        raise PromptError(f"{name}: is a directory, expected a file ending in one of {suffixes}")
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        if os.path.exists(path):
            raise PromptError(f"{name}: unknown kind of file, expected a name ending in one of {suffixes}")
        raise PromptError(
            f"prompts must be a list of prompts, 'emoji' (the shipped list) or a file ending in one of {suffixes}, "
            f'got {shorten.repr(prompts)}; write a single prompt as a list: ["a red apple"]'
        )
    try:
        with open(path, "rb"):
            return name, reader(path, prompt_column)
    except FileNotFoundError:
        raise PromptError(f"{name}: no such file, seen from {os.getcwd()}; check the path") from None
    except (OSError, ValueError) as error:
        raise PromptError(f"{name}: cannot be read: {error}") from None
