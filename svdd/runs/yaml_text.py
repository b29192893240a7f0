"""YAML of unknown origin: refused before it is built, if it nests too deep or its aliases stand for too much."""

import yaml

from svdd import UserError

__all__ = ["SafeLoader", "check_yaml", "read_yaml"]

MAX_DEPTH = 64  # of lists and mappings
MAX_ALIASED = 10_000  # entries that the aliases of a text stand for, all together

SafeLoader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Raises a UserError if a text exceeds one of the limits; what is not YAML passes, up to where it ends to be."""
    sizes: dict[str | None, int] = {}  # of the anchored parts, in entries, with their aliases spelled out
    around: list[tuple[str | None, int]] = []  # anchor and size so far of each list and mapping that is not closed yet
    aliased = 0
    try:
        for event in yaml.parse(text, SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                around.append((event.anchor, 1))
                if len(around) > MAX_DEPTH:
                    raise UserError(f"YAML nests deeper than {MAX_DEPTH} levels; make it flatter")
                continue
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _ in around):
                    raise UserError(f"YAML alias *{event.anchor} stands within the part that it names; remove it")
                size = sizes.get(event.anchor, 1)
                aliased += size
                if aliased > MAX_ALIASED:
                    raise UserError(f"YAML aliases stand for more than {MAX_ALIASED} entries; write them out")
            elif isinstance(event, yaml.ScalarEvent):
                size = 1
                sizes |= {event.anchor: 1} if event.anchor else {}
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = around.pop()
                sizes |= {anchor: size} if anchor else {}
            else:
                continue
            if around:
                around[-1] = (around[-1][0], around[-1][1] + size)
    except (yaml.YAMLError, UnicodeEncodeError):
        pass  # left to the reader


def read_yaml(text: str) -> object:
    """Returns what a YAML text holds; raises a UserError at a limit and a YAMLError if the text is not YAML."""
    check_yaml(text)
    return yaml.load(text, SafeLoader)
