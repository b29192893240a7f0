"""Checks the rows of a prompt source: which columns they have, and whether they can be drawn."""

import json
import math
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from svdd import UserError, check_bound, did_you_mean
from svdd.runs.bounds import MAX_COLUMNS, MAX_DEPTH, MAX_RECORD
from svdd.runs.rows import MAX_SEED, RESERVED_COLUMNS

__all__ = ["PromptError", "Row", "RowReader", "find_columns", "key", "located", "shorten"]

_ALIASES = ("prompts", "text", "caption")  # of the column "prompt", where there is none
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f]")
_BREAKS = re.compile(r"[\t\n\x0b-\x0d\x1c-\x1e\x85\u2028\u2029]+")
_EDGES = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"
_INVISIBLE = {"Cf", "Zl", "Zp", "Zs"}  # Unicode categories
_DIGITS, _DECIMAL = re.compile(r"[0-9]{1,20}"), re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]{1,2})?")
_NO_SEED = {"", "na", "n/a", "<na>", "nan", "null", "none"}
_EXACT = 2**53  # larger floating-point numbers have lost digits
_FOREIGN = re.compile(  # a word processor makes one dash of two hyphens
    r"(?:^|\s)--(?:prompt|negative[_-]prompt|seed|subseed|steps|cfg[_-]scale|width|height|sampler_name|sd_model|n_iter"
    r"|batch_size|styles?|stylize|ar|aspect|v|version|niji|q|quality|s|chaos|no|iw|tile|test|testp|hd)(?=\s|$)"
    r"|(?:^|\s)[\u2013\u2014](?:seed|stylize|ar|aspect|v|version|niji|q|quality|s|chaos|iw)(?=\s+\.?\d)"
    r"|^Negative prompt: |^Steps: \d+, "
)

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


class RowReader:
    """Turns the rows of one source into records, and collects what should be said about them.

    Args:
        prompt_column: Name of the prompts' column. If it is "prompt" and the first row lacks it, it may be called
            `prompts`, `text` or `caption`, in all rows alike.
        max_length: Longest prompt, in characters.
    """

    def __init__(self, prompt_column: str, max_length: int) -> None:
        self.prompt_column, self._max_length, self._known = prompt_column, max_length, False
        self._notes: dict[str, list[str]] = {}  # the places at which each applies, at most two

    def note(self, text: str, place: str = "") -> None:
        """Adds a warning; the same text at several places is one warning."""
        places = self._notes.setdefault(text, [])
        if len(places) < 2:
            places.append(place)

    def withdraw(self, text: str) -> None:
        """Removes a warning."""
        self._notes.pop(text, None)

    def leave_out(self, column: str) -> None:
        """Adds the warning about a column that is not carried."""
        self.note(f"column {column!r} holds values that JSON lacks and is left out of the results")

    def notes(self) -> Iterable[str]:
        """Yields the warnings."""
        for text, (place, *more) in self._notes.items():
            yield f"{place}{' and others' * bool(more)}: {text}" if place else text

    def record(self, place: str, row: Any) -> bytes | None:
        """Checks a row and returns it as a line of JSON, an object of its columns; None if it is blank.

        Raises:
            PromptError: If it cannot be used; the message begins with its place.
        """
        with located(place):
            if isinstance(row, str):
                if "\t" in row.strip():
                    self.note("holds a tab, which becomes a space; a table needs a name ending in .tsv or .csv", place)
                row = {self.prompt_column: row}
            elif isinstance(row, Mapping):
                self.find(row)
            else:
                raise PromptError(f"expected a prompt as a string or an object, got {shorten.repr(row)}")
            return self._record(place, {str(name): value for name, value in row.items()})

    def find(self, names: Iterable[Any], final: bool = True) -> Mapping[str, str]:
        """Returns `find_columns` of the names of a row; with `final`, the other rows must name the prompts alike."""
        given = tuple(map(str, names))
        check_bound("columns", len(given), MAX_COLUMNS, "leave out those that you do not need", PromptError)
        columns = find_columns(given, self.prompt_column, not self._known)
        if final:
            self.prompt_column, self._known = columns["prompt"], True
        return columns

    def _record(self, place: str, extra: dict[str, Any]) -> bytes | None:
        roles = find_columns(tuple(extra), self.prompt_column)
        for near, right in _near_misses(tuple(extra), self.prompt_column):
            self.note(f"column {near!r} is only copied into the results, did you mean {right!r}?")
        text = self._clean(extra.pop(roles["prompt"]), roles["prompt"])
        negative, seed = (extra.pop(roles[role], None) if role in roles else None for role in _OPTIONAL)
        negative_prompt = self._clean(negative, "negative_prompt") or None
        number = _seed(seed)
        if not text:
            return None
        if foreign := _FOREIGN.search(text):
            advice = "svdd takes settings from columns and options of its own"
            what = f"options of another program are read as part of the prompt; {advice}"
            self.note(what, f"{place} ({foreign[0].strip(' :')})")
        for name in list(extra):
            try:
                extra[name] = _carried(extra[name], name)
            except _BinaryData:
                del extra[name]
                self.leave_out(name)
        try:
            known = {"prompt": text, "negative_prompt": negative_prompt, "seed": number}
            columns = {name: value for name, value in known.items() if value is not None} | extra
            record = json.dumps(columns, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            raise PromptError("holds half of a surrogate pair, from a broken \\u escape or a wrong encoding") from None
        except ValueError as error:
            raise PromptError(f"a column cannot be carried into the results as JSON: {error}") from None
        advice = "leave out the columns that you do not need"
        check_bound("bytes of a prompt with its columns", len(record), MAX_RECORD, advice, PromptError)
        return record

    def _clean(self, value: Any, column: str) -> str:
        """Checks a text and puts it on one line; a missing or invisible value is an empty text."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if not isinstance(value, str):
            raise PromptError(f"{column} must be a string, got {shorten.repr(value)}")
        if (control := _CONTROL.search(value)) is not None:
            which = f"U+{ord(control.group()):04X} at character {control.start() + 1}"
            raise PromptError(f"{column} holds the control character {which}; remove it")
        text = _BREAKS.sub(" ", value).strip(_EDGES)
        if len(text) > self._max_length:
            what = f"{column} has {len(text)} characters, expected at most {self._max_length}"
            raise PromptError(f"{what}; shorten it or raise max_prompt_length")
        return text if any(unicodedata.category(character) not in _INVISIBLE for character in text) else ""


_OPTIONAL = ("negative_prompt", "seed")


def key(name: str) -> str:
    """Returns a column's name without case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_\-\u200b\ufeff]", "", name).casefold()


@lru_cache(maxsize=64)  # the rows of a source have the same columns
def find_columns(names: tuple[str, ...], prompt_column: str, aliases: bool = False) -> Mapping[str, str]:
    """Returns the names of the columns with a meaning: `prompt`, and where there are any, `negative_prompt` and `seed`.

    Names are compared without case, spaces, underscores and hyphens. With `aliases` the column `prompt` may be called
    `prompts`, `text` or `caption`.

    Raises:
        PromptError: If there is none of prompts, if two columns have one meaning, or if a name is taken.
    """
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise PromptError(f"column {repeated[0]!r} appears more than once; rename one of them")
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[key(name)].append(name)
    wanted = {"prompt": prompt_column, **{role: role for role in _OPTIONAL}}
    found = {role: by_key[key(name)] for role, name in wanted.items() if key(name) in by_key}
    if aliases and prompt_column == "prompt" and "prompt" not in found:
        found |= {"prompt": same} if (same := [name for alias in _ALIASES for name in by_key.get(alias, [])]) else {}
    for role, same in found.items():
        if len(same) > 1:
            advice = ", or name one with prompt_column" if role == "prompt" and prompt_column not in same else ""
            raise PromptError(f"columns {same[0]!r} and {same[1]!r} could both be the {role}; rename one{advice}")
    if "prompt" not in found:
        shown = ", ".join(map(shorten.repr, names[:20])) or "none"
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        what = f"no column {prompt_column!r} among the columns {shown}{more}"
        wide = next((mark for mark in "\uff0c\uff1b\u3001" if any(mark in name for name in names)), "")
        apart = re.split(r"[,;|\t]", names[0]) if len(names) == 1 else names  # of another delimiter than expected
        hint = did_you_mean(prompt_column, apart, ", ")
        if wide:
            raise PromptError(f"{what}, which hold the fullwidth mark {wide!r}; put ASCII commas between the columns")
        raise PromptError(f"{what}{hint}; say with prompt_column which one holds the prompts")
    columns = {role: same[0] for role, same in found.items()}
    if taken := sorted(RESERVED_COLUMNS.intersection(names).difference(columns.values())):
        raise PromptError(f"column {taken[0]!r} has the name of a result that svdd writes itself; rename the column")
    return columns


@lru_cache(maxsize=64)
def _near_misses(names: tuple[str, ...], prompt_column: str) -> list[tuple[str, str]]:
    """Returns the columns whose name resembles that of an optional one that is missing, each with that name."""
    columns = find_columns(names, prompt_column)
    missing = {key(role): role for role in _OPTIONAL if role not in columns}
    if "negativeprompt" in missing:
        missing["negative"] = "negative_prompt"
    near = []
    for name in names:
        within = [word for word in missing if word in key(name)]
        if name not in columns.values() and (match := within or get_close_matches(key(name), missing, 1, cutoff=0.76)):
            near.append((name, missing[match[0]]))
    return near


def _seed(value: Any) -> int | None:
    """Returns a seed, which may be text or a whole decimal number; None if there is none."""
    number: Any = value.strip() if isinstance(value, str) else value
    if isinstance(number, str) and number.lower() in _NO_SEED:
        return None
    if number is None or (isinstance(number, Real | Decimal) and number != number):
        return None
    if isinstance(number, Decimal):
        number = int(number) if 0 <= number <= MAX_SEED and number == int(number) else -1
    if isinstance(number, str):
        number = int(number) if _DIGITS.fullmatch(number) else float(number) if _DECIMAL.fullmatch(number) else None
    decimal = isinstance(number, Real) and not isinstance(number, Integral)
    number = float(number) if decimal else int(number) if isinstance(number, Integral) and number is not True else -1
    if decimal and _EXACT < number <= MAX_SEED:
        raise PromptError(f"seed {shorten.repr(value)} has lost digits as a decimal number; write it as an integer")
    if not 0 <= number <= MAX_SEED or number != int(number) or value is False:
        raise PromptError(f"seed must be an integer from 0 to 2**64 - 1 or empty, got {shorten.repr(value)}")
    return int(number)


class _BinaryData(Exception):
    """A column holds bytes."""


def _carried(value: Any, column: str, depth: int = 0) -> Any:
    """Returns a value as JSON data: NaN as None, and what JSON lacks (dates, decimals, infinities) as text."""
    check_bound(f"depth of column {column!r}", depth, MAX_DEPTH, "flatten it or leave it out", PromptError)
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        raise _BinaryData
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(name): _carried(entry, column, depth + 1) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_carried(entry, column, depth + 1) for entry in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return _carried(value.tolist(), column, depth + 1)
    return str(value)
