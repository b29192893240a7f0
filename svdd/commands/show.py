"""`svdd list`: the classes that can be selected by name."""

from svdd import UserError, did_you_mean, say
from svdd.commands.options import Options
from svdd.commands.registry import KINDS, catalogue

__all__ = ["list_parser", "show"]

_PLURALS = "samplers, values, rewards, diffusions"


def list_parser() -> Options:
    """Returns the parser of `svdd list`."""
    parser = Options("svdd list", "Lists the classes that can be selected by name, each with what it does.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{_PLURALS}; by default all")
    return parser


def show(words: list[str]) -> None:
    """Runs `svdd list` for the given kinds, by default for all; raises UserError if one is unknown."""
    kinds = [word.lower() for word in list_parser().parse_args(words).kinds]
    kinds = [kind if kind in KINDS else kind.removesuffix("s") for kind in kinds]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"svdd list takes {_PLURALS} or nothing, got {unknown[0]!r}{did_you_mean(unknown[0], KINDS)}")
    entries = [entry for entry in catalogue() if not kinds or entry.kind in kinds]
    width = max(len(entry.name) for entry in entries)
    for kind in kinds or KINDS:
        say(f"{kind}:")
        for name, description, package in (entry[1:] for entry in entries if entry.kind == kind):
            say(f"  {name:<{width}}  {description}{'' if package == 'svdd' else f'  [{package}]'}")
