"""Rows of comma-, semicolon- and tab-separated tables with a header."""

import csv
import io
from collections import deque
from collections.abc import Iterator

from svdd.runs.bounds import MAX_RECORD
from svdd.runs.prompt_rows import PromptError, Row, RowReader, located

__all__ = ["read_table"]

_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_MOST_LINES = 64  # of a quoted field in a tab-separated table

Fields = tuple[int, list[str]]  # the number of the line with which a row begins, and its fields


def read_table(lines: Iterator[str], usual: str, reader: RowReader) -> Iterator[Row]:
    """Yields the rows of a table by column.

    Another delimiter than the usual one counts only if it, and not the usual one, makes a column of prompts in the
    header. In a table with one column, delimiters are text. Columns without a name and repeated headers are left out.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first, line = next(numbered, (0, ""))
    if line.lower().startswith("sep=") and len(line.strip()) == 5:  # Excel's hint
        usual, (first, line) = line.strip()[4], next(numbered, (0, ""))
    if not line:
        return
    delimiter = _delimiter(line, usual, reader)
    with located(f"line {first}"):
        header = [name.strip() for name in _split(line, delimiter)]
        while header and not header[-1]:
            header.pop()
        reader.find(filter(None, header))
    quoted = delimiter != "\t" or all(name.startswith('"') for name in line.strip().split("\t"))
    rows = (
        _quoted_rows(lines, delimiter, first + 1, len(header) > 1)
        if quoted
        else _text_rows(lines, len(header), first + 1)
    )
    for number, fields in rows:
        place = f"line {number}"
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(header) == 1 and fields:
            fields = [delimiter.join(fields)]
        if not any(fields) or [field.strip() for field in fields] == header:
            yield place, ""
        elif len(fields) != len(header):
            what = f"{place}: expected {len(header)} fields as in the header, got {len(fields)}"
            raise PromptError(f'{what}; put "quotes" around a field that holds a {_NAMES.get(delimiter, delimiter)}')
        else:
            yield place, {name: field for name, field in zip(header, fields, strict=True) if name}


def _delimiter(header: str, usual: str, reader: RowReader) -> str:
    for delimiter in dict.fromkeys((usual, *_NAMES)):
        try:
            reader.find(filter(None, (name.strip() for name in _split(header, delimiter))), final=False)
        except PromptError:
            continue
        return delimiter
    return usual


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise PromptError(f"malformed row: {error}; check the quotes") from None


def _quoted_rows(lines: Iterator[str], delimiter: str, first: int, trim: bool) -> Iterator[Fields]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=trim, strict=True)
    while True:
        number = first + reader.line_num  # where the row starts: a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise PromptError(f"line {number}: malformed row: {error}; check the quotes") from None
        if fields is None:
            return
        yield number, fields


def _text_rows(lines: Iterator[str], width: int, number: int) -> Iterator[Fields]:
    """Splits at tabs. Quotes are text, except in a row that is exactly what a CSV writer makes of such fields."""
    waiting: deque[str] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        fields, taken, size, quotes = None, [line], len(line), line.count('"')
        if line.startswith('"') or '\t"' in line:
            while quotes % 2 and len(taken) < _MOST_LINES and size < MAX_RECORD:
                if (more := waiting.popleft() if waiting else next(lines, None)) is None:
                    break
                taken.append(more)
                size, quotes = size + len(more), quotes + more.count('"')
            fields = _as_written("".join(taken))
        if fields is None or len(fields) != width:
            fields = line.rstrip("\r\n").split("\t") if line.strip() else []
            waiting.extendleft(reversed(taken[1:]))
            taken = [line]
        yield number, fields
        number += len(taken)


def _as_written(text: str) -> list[str] | None:
    """Returns the fields of a row whose quotes are there because a field needs them, else None."""
    text = text.rstrip("\r\n")
    try:
        (fields,) = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return None
    written = io.StringIO()
    csv.writer(written, delimiter="\t").writerow(fields)
    return fields if written.getvalue() == text + "\r\n" else None
