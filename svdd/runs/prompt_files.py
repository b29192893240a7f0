"""Reads prompts out of lists and files, and says by line what is wrong with them."""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Any

from svdd import check_bound
from svdd.runs.bounds import MAX_JSON_FILE, MAX_LINE
from svdd.runs.files import natural, regular_only
from svdd.runs.prompt_rows import PromptError, Row, RowReader, key, located, shorten
from svdd.runs.prompt_tables import read_table

__all__ = ["open_source"]

_UNDECODED = re.compile(r"[\x00\ud800-\udfff]")
_MARKS = {  # how a file begins, and its encoding; that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BINARY = {b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive or an Excel file", b"PAR1": "a parquet file"}
_ADVICE = dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst"), "; unpack it first")
_ADVICE |= dict.fromkeys((".xlsx", ".xls", ".ods"), "; save the sheet as CSV (UTF-8)")
_LFS = b"version https://git-lfs"  # how the small file begins that stands for one not yet downloaded
_QUOTED = re.compile(r"""(?:"(?:[^"\\]|""|\\.)*"|'[^']*'|\u201c[^\u201d]*\u201d),?""")
_IN_QUOTES = "every line is in quotes, which are read as part of the prompts; remove them"
_LISTS = ("prompts", "annotations", "data")  # keys of a JSON object under which the rows may stand


def _encoding(path: str) -> str:
    """Returns the encoding that a file's byte-order mark names, by default UTF-8; refuses well-known binary files."""
    with open(path, "rb", opener=regular_only) as file:
        start = file.read(4)
    for magic, what in _BINARY.items():
        if start.startswith(magic):
            raise PromptError(f"is {what}, not text; unpack it, or save it as text")
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def _open_text(path: str, newline: str | None) -> Any:
    encoding = _encoding(path)
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    return open(path, encoding=encoding, errors=errors, newline=newline, opener=regular_only)


def _check_decoded(text: str, first_line: int) -> None:
    """Refuses bytes that are not UTF-8 (they arrive as lone surrogates) and NUL, which UTF-16 is full of."""
    if (match := _UNDECODED.search(text)) is not None:
        before = text[: match.start()]
        line, column = first_line + before.count("\n"), before[before.rfind("\n") + 1 :]
        position = len(column.encode("utf-8", "surrogateescape")) + 1
        byte = ord(match.group()) & 0xFF
        looks = ", this looks like UTF-16 or a binary file" if byte in (0x00, 0xFE, 0xFF) else ""
        found = f"line {line}: byte 0x{byte:02x} at position {position} is not UTF-8 text{looks}"
        raise PromptError(f"{found}; save the file as UTF-8")


def _read_lines(path: str) -> Iterator[str]:
    """Yields the lines of a file with their ends (LF, CRLF or CR), one in memory at a time, without byte-order marks.

    Marks within a file come from files that were joined.
    """
    with _open_text(path, newline="") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), 1):
            _check_decoded(line, number)
            if len(line) == MAX_LINE:
                raise PromptError(f"line {number}: is longer than {MAX_LINE} characters; is this a text file?")
            if line := line.replace("\ufeff", ""):
                yield line


def _parse_json(text: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}"
        raise PromptError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"line {line}: not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {shorten.repr(twice)} twice")
    return found


def _numbered(items: Iterable[Any], place: str = "item") -> Iterator[Row]:
    return ((f"{place} {number}", item) for number, item in enumerate(items, 1))


def _read_txt(path: str, reader: RowReader) -> Iterator[Row]:
    all_quoted = True
    for number, line in enumerate(_read_lines(path), 1):
        place, text = f"line {number}", line.strip()
        if all_quoted and text:
            if all_quoted := _QUOTED.fullmatch(text) is not None:
                reader.note(_IN_QUOTES, place)
            else:
                reader.withdraw(_IN_QUOTES)
        if what := _other_format(text, number):
            reader.note(f"looks like {what}, but a .txt file is read as one prompt a line; rename it", place)
        yield place, line


def _other_format(line: str, number: int) -> str:
    """Returns what a line of a .txt file looks like, with the name it should have; "" for a prompt."""
    if line in ("[", "{") and number == 1:
        return "JSON (.json)"
    if line.startswith(("{", "[")) and line.endswith(("}", "]")):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and value:
                return "JSON lines (.jsonl)"
            if isinstance(value, list) and value and all(isinstance(item, str | dict) for item in value):
                return "a JSON list (.json)"
    if number == 1 and len(names := re.split("[,;|]", line)) > 1:
        found = {key(name.strip().strip('"')) for name in names}
        if found & {"prompt", "prompts"} or (found & {"text", "caption"} and found & {"seed", "negativeprompt"}):
            return "a table with a header (.csv)"
    return ""


def _read_jsonl(path: str, reader: RowReader) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), 1):
        yield f"line {number}", _parse_json(line.rstrip(), number) if line.strip() else ""


def _read_json(path: str, reader: RowReader) -> Iterator[Row]:
    advice = "save it as .jsonl, which is read line by line"
    check_bound("bytes of a .json file", os.path.getsize(path), MAX_JSON_FILE, advice, PromptError)
    with _open_text(path, newline=None) as file:
        text = file.read()
    _check_decoded(text, 1)
    text = text.replace("\ufeff", "")
    try:
        items = _parse_json(text, 1) if text.strip() else []
    except PromptError as error:
        if "Extra data" not in str(error):
            raise
        yield from _read_jsonl(path, reader)  # what some libraries write as .json
        return
    if isinstance(items, dict):
        known = [name for name in _LISTS if isinstance(items.get(name), list)]
        if len(known) == 1:
            items = items[known[0]]
        elif items and all(isinstance(row, dict) for row in items.values()):
            items = [{"id": name, **row} for name, row in items.items()]
    if not isinstance(items, list):
        raise PromptError(f'expected an array of prompts or {{"prompts": [...]}}, got {shorten.repr(items)}')
    yield from _numbered(items)


def _read_table(path: str, reader: RowReader, delimiter: str) -> Iterator[Row]:
    return read_table(_read_lines(path), delimiter, reader)


def _read_parquet(path: str, reader: RowReader) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptError("reading parquet needs pyarrow, which is missing: pip install 'svdd[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            with located("schema"):
                columns = reader.find(schema.names).values()
            kept = [field.name for field in schema if field.name in columns or not _is_lacking(field.type)]
            for name in schema.names:
                if name not in kept:
                    reader.leave_out(name)
            batches = map(_as_text, file.iter_batches(256, columns=kept))
            rows = (row for batch in batches for row in _python_rows(batch, reader))
            yield from _numbered(rows, "row")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"not a readable parquet file: {' '.join(str(error).split())}") from None


def _python_rows(batch: Any, reader: RowReader) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch; what Python has no value for, such as dates after the year 9999, is left out."""
    from pyarrow import ArrowException

    def value_of(scalar: Any, column: str) -> Any:
        try:
            return scalar.as_py()
        except (ArrowException, UnicodeDecodeError):
            raise
        except (OverflowError, ValueError, KeyError):  # a KeyError for an unknown time zone
            reader.note(f"column {column!r} holds dates or times that Python cannot represent, which are left out")
            return None

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except (OverflowError, ValueError, KeyError):
            columns.append([value_of(scalar, name) for scalar in column])
    return (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))


def _is_lacking(kind: Any) -> bool:
    """Whether JSON has nothing for a type: bytes, also in lists and structs, and nanoseconds in these."""
    return "binary" in str(kind) or ("[ns" in str(kind) and kind.num_fields > 0)


def _as_text(batch: Any) -> Any:
    """Casts the columns of a batch that Python has no type for, nanoseconds and texts that are not marked as such."""
    from pyarrow import string

    for k, field in enumerate(batch.schema):
        if "[ns" in str(field.type) or "binary" in str(field.type):
            batch = batch.set_column(k, field.name, batch.column(k).cast(string()))
    return batch


def _read_folder(path: str, reader: RowReader, suffixes: str) -> Iterator[Row]:
    """Yields one prompt from each .txt file of a folder, in natural order; the file's name becomes a column."""
    names = [name for name in os.listdir(path) if name.lower().endswith(".txt")]
    if not names:
        raise PromptError(f"is a directory, expected a file ending in one of {suffixes}, or .txt files in it")
    for name in sorted(names, key=natural):
        text = " ".join(line.strip() for line in _read_lines(os.path.join(path, name)))
        yield name, {reader.prompt_column: text, "prompt_file": name}


_READERS: dict[str, Callable[[str, RowReader], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def open_source(prompts: Sequence[Any] | str, reader: RowReader) -> tuple[str, Iterator[Row]]:
    """Returns a source's name for messages and its rows, none of them read yet."""
    if not isinstance(prompts, str):
        return "prompts", _numbered(prompts)
    name = prompts if prompts.isprintable() else shorten.repr(prompts)
    path = os.path.expanduser(prompts)
    if prompts == "emoji" and not os.path.exists(path):  # the list that ships with svdd
        path = str(files("svdd") / "assets" / "emoji_prompts.txt")
    suffixes, suffix = ", ".join(_READERS), os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return name, _decoded(_read_folder(path, reader, suffixes))
    read = _READERS.get(suffix)
    if read is None:
        if os.path.exists(path):
            expected = f"expected a name ending in one of {suffixes}{_ADVICE.get(suffix, '')}"
            raise PromptError(f"{name}: unknown kind of file, {expected}")
        raise PromptError(
            f"prompts must be a list of prompts, 'emoji' (the shipped list) or a file ending in one of {suffixes}, "
            f"got {shorten.repr(prompts)}; {_list_advice(prompts)}"
        )
    try:
        with open(path, "rb", opener=regular_only) as file:
            pointer = file.read(len(_LFS)) == _LFS
    except FileNotFoundError:
        raise PromptError(f"{name}: no such file, seen from {os.getcwd()}; check the path") from None
    except OSError as error:
        raise PromptError(f"{name}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise PromptError(f"{name}: cannot be read: {error}") from None
    if pointer:
        raise PromptError(f"{name}: is a Git LFS pointer, not the file itself; run `git lfs pull`")
    return name, _decoded(read(path, reader))


def _decoded(rows: Iterator[Row]) -> Iterator[Row]:
    """Yields the rows; a decoding error of a file with the mark of another encoding becomes a PromptError."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise PromptError(f"is not {error.encoding} text ({error.reason}); save the file as UTF-8") from None


def _list_advice(prompts: str) -> str:
    """Says how to write a list, with the given prompts if they look like one whose quotes were forgotten."""
    if not prompts.startswith("["):
        return 'write a single prompt as a list: ["a red apple"]'
    items = [item.strip().strip("'\"") for item in prompts.strip("[]").split(",")]
    shown = json.dumps(items, ensure_ascii=False)
    return f"put quotes around every prompt of a list: {shown if len(shown) < 200 else ['first', 'second']}"
