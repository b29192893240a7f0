"""Command lines of the commands that have no configuration."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from svdd import UserError

__all__ = ["Options"]


class Options(argparse.ArgumentParser):
    """Takes options by their whole names, and reports a bad one as a `UserError`."""

    def __init__(self, name: str, description: str, **more: Any) -> None:
        super().__init__(name, description=description, allow_abbrev=False, **more)
        self._flags: set[str] = set()

    def add_flag(self, name: str, purpose: str) -> None:
        """Adds an option that takes true or false, by default false."""
        self._flags.add(name)
        self.add_argument(name, type=_truth, default=False, metavar="true|false", help=purpose)

    def spelled_out(self, words: Sequence[str]) -> list[str]:
        """Returns a command line in which flags that stand alone, for true, have that value."""
        following = [*words[1:], ""]
        return [
            f"{word}=true" if word in self._flags and after.lower() not in ("true", "false") else word
            for word, after in zip(words, following, strict=False)
        ]

    def error(self, message: str) -> NoReturn:
        """Raises a UserError."""
        raise UserError(f"{message}; `{self.prog} --help` lists all settings")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
