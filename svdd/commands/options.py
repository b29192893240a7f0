"""Command lines of the commands that have no configuration."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from svdd import UserError

__all__ = ["Options"]


class Options(argparse.ArgumentParser):
    """Takes options by their whole names, and reports a bad one as a `UserError`."""

    def __init__(self, name: str, description: str, **more: Any) -> None:
        super().__init__(name, description=description, allow_abbrev=False, **more)
        self._flags: set[str] = set()
        self.others: list[str] = []  # names of options that the parser leaves to another

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
        from svdd.commands.settings.nearest import nearest

        where = f"; `{self.prog} --help` lists all settings"
        if lacking := re.match("the following arguments are required: (.*)", message):
            helps = {str(each.metavar): each.help for each in self._actions if not each.option_strings}
            said = "; ".join(f"{name} is required: {helps[name]}" for name in lacking[1].split(", "))
            raise UserError(said + where)
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            own = [name.lstrip("-") for each in self._actions for name in each.option_strings if name[:2] == "--"]
            found = nearest(unknown[1], own) or nearest(unknown[1], self.others)
            where = f"; did you mean --{found}?" if found else where
        raise UserError(message + where)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
