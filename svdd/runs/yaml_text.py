"""YAML of unknown origin: refused before it is built if a key stands twice, or it nests or repeats too much."""

from dataclasses import dataclass

import yaml

from svdd import UserError

__all__ = ["SafeLoader", "check_yaml", "read_yaml"]

MAX_DEPTH = 64  # of lists and mappings
MAX_ALIASED = 10_000  # entries that the aliases of a text stand for, all together

SafeLoader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Part:
    """A list or mapping that is not closed yet."""

    anchor: str | None
    keys: set[str] | None  # of a mapping, so far
    size: int = 1  # in entries, with its aliases spelled out
    entries: int = 0  # keys and values

    def add(self, event: yaml.NodeEvent) -> None:
        """Counts an entry; raises a UserError for a key that the mapping has already."""
        if self.keys is not None and self.entries % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            if event.value in self.keys and event.value != "<<":
                where = f", again in line {mark.line + 1}" if (mark := event.start_mark) else ""
                raise UserError(f"YAML key {event.value!r} stands twice in one mapping{where}; remove one")
            self.keys.add(event.value)
        self.entries += 1


def check_yaml(text: str) -> None:
    """Raises a UserError for a key that stands twice, or at a limit; what is not YAML passes, up to where it ends."""
    sizes: dict[str | None, int] = {}  # of the anchored parts
    around: list[_Part] = []
    aliased = 0
    try:
        for event in yaml.parse(text, SafeLoader):
            if around and isinstance(event, yaml.NodeEvent):
                around[-1].add(event)
            if isinstance(event, yaml.CollectionStartEvent):
                around.append(_Part(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
                if len(around) > MAX_DEPTH:
                    raise UserError(f"YAML nests deeper than {MAX_DEPTH} levels; make it flatter")
                continue
            if isinstance(event, yaml.AliasEvent):
                if any(part.anchor == event.anchor for part in around):
                    raise UserError(f"YAML alias *{event.anchor} stands within the part that it names; remove it")
                size = sizes.get(event.anchor, 1)
                aliased += size
                if aliased > MAX_ALIASED:
                    raise UserError(f"YAML aliases stand for more than {MAX_ALIASED} entries; write them out")
            elif isinstance(event, yaml.ScalarEvent):
                size = 1
                sizes |= {event.anchor: 1} if event.anchor else {}
            elif isinstance(event, yaml.CollectionEndEvent):
                closed = around.pop()
                size = closed.size
                sizes |= {closed.anchor: size} if closed.anchor else {}
            else:
                continue
            if around:
                around[-1].size += size
    except (yaml.YAMLError, UnicodeEncodeError):
        pass  # left to the reader


def read_yaml(text: str) -> object:
    """Returns what a YAML text holds; raises a UserError at a limit and a YAMLError if the text is not YAML."""
    check_yaml(text)
    return yaml.load(text, SafeLoader)
