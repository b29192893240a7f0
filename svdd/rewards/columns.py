"""Columns of a prompt file that rewards read, such as the path of a reference picture."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from svdd import RewardError, UserError, did_you_mean

if TYPE_CHECKING:
    from svdd.rewards.base import Reward

__all__ = ["Columns", "PromptText", "column", "column_path", "columns_of", "require_columns"]


class PromptText(str):
    """A prompt with the columns of its row that rewards read.

    Two are equal only if their columns are, so that what is cached by prompt fits the columns; a plain `str` equals
    each of the same text.

    Args:
        text: The prompt.
        columns: Values by column.
        folder: That of the prompt file, to which relative paths in columns refer; None for the working directory.
    """

    columns: Mapping[str, Any]
    folder: Path | None

    def __new__(
        cls, text: str, columns: Mapping[str, Any] | None = None, folder: str | Path | None = None
    ) -> "PromptText":
        """Makes a prompt."""
        made = super().__new__(cls, text)
        made.columns, made.folder = MappingProxyType(dict(columns or {})), None if folder is None else Path(folder)
        return made

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PromptText) and (self.columns, self.folder) != (other.columns, other.folder):
            return False
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce__(self) -> Any:
        return PromptText, (str(self), dict(self.columns), self.folder)


def column(prompt: str, name: str) -> Any | None:
    """Returns what the prompt's row has in a column; None if that is blank, or for a plain `str`."""
    value = getattr(prompt, "columns", {}).get(name)
    return None if _is_blank(value) else value


def column_path(prompt: str, name: str) -> Path | None:
    """Returns the path in a column; a relative one refers to the folder of the prompt file."""
    value = column(prompt, name)
    return None if value is None else _path(value, getattr(prompt, "folder", None))


class _Row(Protocol):
    """A prompt with the other columns of its source; `svdd.runs.rows.Prompt` is one."""

    @property
    def text(self) -> str: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...
    @property
    def folder(self) -> str | None: ...


class Columns(NamedTuple):
    """The columns that rewards read, each with the name of a reward that does."""

    needed: dict[str, str]
    optional: dict[str, str]
    paths: dict[str, str]  # those of both that hold paths of files
    checks: list[Callable[[str], None]]  # the rewards' `check_prompt`

    def text(self, row: _Row) -> str:
        """Returns the prompt of a row for rewards: a `PromptText` if they read columns, even if it has none of them."""
        names = {**self.needed, **self.optional}
        known = {name: row.extra[name] for name in names if name in row.extra}
        return PromptText(row.text, known, row.folder) if names else row.text

    def check(self, rows: Iterable[_Row], place: Callable[[int], str]) -> None:
        """Raises UserError if a row lacks a needed column, its path is not that of a file, or a reward refuses it.

        Args:
            rows: Prompts with their columns.
            place: Returns where the k-th row stands, for messages.
        """
        if not self.needed and not self.paths and not self.checks:
            return
        for k, row in enumerate(rows):
            for name, reward in self.needed.items():
                if _is_blank(row.extra.get(name)):
                    known = ", ".join(map(repr, row.extra)) or "none"
                    hint = f"; other columns: {known}{did_you_mean(name, row.extra)}"
                    what = f"column {name!r} is blank" if name in row.extra else f"there is no column {name!r}"
                    raise UserError(f"{place(k)}: {what}, which {reward} needs{'' if name in row.extra else hint}")
            for name, reward in self.paths.items():
                if not _is_blank(value := row.extra.get(name)) and not (path := _path(value, row.folder)).is_file():
                    raise UserError(f"{place(k)}: column {name!r}, which {reward} reads: there is no file {path}")
            try:
                for check in self.checks:
                    check(self.text(row))
            except UserError as error:
                raise UserError(f"{place(k)}: {error}") from error

    def contents(self, rows: Iterable[_Row]) -> Iterator[bytes]:
        """Yields, for each row, a digest of the files in its columns that rewards read; nothing if they read none."""
        for row in rows if self.paths else ():
            values = [row.extra.get(name) for name in self.paths]
            yield b"".join(b"-" if _is_blank(value) else _content(_path(value, row.folder)) for value in values)


def columns_of(*rewards: "Reward") -> Columns:
    """Returns the columns that rewards and their parts read."""
    found = Columns({}, {}, {}, [])
    kinds = {"columns": found.needed, "optional_columns": found.optional, "path_columns": found.paths}
    for reward in rewards:
        part: Any
        for part in reward.modules():
            if hasattr(part, "optional_columns"):  # a reward
                for kind, names in kinds.items():
                    for name in getattr(part, kind):
                        names.setdefault(name, str(part.name))
                if part.check_prompt is not None:
                    found.checks.append(part.check_prompt)
    return found


def require_columns(reward: str, columns: Sequence[str], prompts: Sequence[str]) -> None:
    """Raises RewardError if a prompt lacks a column that a reward needs."""
    for name in columns:
        for prompt in prompts:
            if column(prompt, name) is None:
                help = f"a prompt file, or in Python PromptText(prompt, {{{name!r}: ...}}), gives it"
                raise RewardError(f"reward {reward} needs column {name!r} of the prompt {str(prompt)!r}: {help}")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _content(path: Path) -> bytes:
    try:
        known = path.stat()
        return _digest(path, known.st_size, known.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=1024)
def _digest(path: Path, *version: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _path(value: Any, folder: str | Path | None) -> Path:
    return Path(folder or "", Path(str(value)).expanduser())
