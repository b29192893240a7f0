"""The classes that can be selected by name, and `svdd list`.

Every imported concrete subclass of `Diffusion`, `Sampler`, `Value` and `Reward` is selectable by its class name: the
built-in ones, those of plug-ins, and a user's own.
"""

import ast
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from svdd import UserError

__all__ = ["KINDS", "Entry", "catalogue", "import_all", "names_of", "show"]

PLUGIN_GROUP = "svdd.plugins"
KINDS = {  # kind: (package of the built-ins, base class)
    "diffusion": ("svdd.diffusion", "Diffusion"),
    "sampler": ("svdd.samplers", "Sampler"),
    "value": ("svdd.values", "Value"),
    "reward": ("svdd.rewards", "Reward"),
}


@dataclass(frozen=True)
class Entry:
    """One selectable class: a key of `KINDS`, its name, the first line of its docstring, and its top-level package."""

    kind: str
    name: str
    description: str
    package: str


def import_all() -> None:
    """Imports every built-in module and every plug-in; a plug-in that fails to import warns and is skipped."""
    for package, _ in KINDS.values():
        for path in _modules(package):
            import_module(f"{package}.{path.stem}")
    for plugin in entry_points(group=PLUGIN_GROUP):
        try:
            plugin.load()
        except Exception as error:  # a third-party package can raise anything, and must not stop the others
            source = plugin.dist.name if plugin.dist else plugin.value
            warnings.warn(
                f"plug-in {plugin.name!r} of {source} was skipped: {type(error).__name__}: {error}", stacklevel=2
            )


def catalogue() -> list[Entry]:
    """Returns all selectable classes, by kind and name; built-in ones are read from their source, not imported."""
    entries = [entry for kind, (package, base) in KINDS.items() for entry in _read_sources(kind, package, base)]
    if entry_points(group=PLUGIN_GROUP):
        import_all()
        known = {(entry.kind, entry.name) for entry in entries}
        entries += [entry for entry in _imported() if (entry.kind, entry.name) not in known]
    return sorted(entries, key=lambda entry: (list(KINDS).index(entry.kind), entry.name))


def show(words: Sequence[str]) -> None:
    """Runs `svdd list`.

    Args:
        words: The kinds to list; all by default.

    Raises:
        UserError: If a kind is unknown.
    """
    if unknown := [word for word in words if word not in KINDS]:
        raise UserError(f"svdd list takes {', '.join(KINDS)} or nothing, got {unknown[0]!r}")
    entries = [entry for entry in catalogue() if not words or entry.kind in words]
    width = max(len(entry.name) for entry in entries)
    for kind in words or KINDS:
        print(f"{kind}:")
        for entry in entries:
            if entry.kind == kind:
                source = "" if entry.package == "svdd" else f"  [{entry.package}]"
                print(f"  {entry.name:<{width}}  {entry.description}{source}")


def names_of(kind: str) -> list[str]:
    """Returns the names that select a class of this kind."""
    return [entry.name for entry in catalogue() if entry.kind == kind]


def _modules(package: str) -> list[Path]:
    folder = Path(__file__).parents[1] / package.split(".")[1]
    return sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "base"))


def _read_sources(kind: str, package: str, base: str) -> Iterator[Entry]:
    """Yields the concrete classes below `base`, however far, in the files of a package."""
    nodes = [node for path in _modules(package) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    parents = {name: {b.id for b in node.bases if isinstance(b, ast.Name)} for name, node in classes.items()}
    known = {base}
    while below := {name for name, above in parents.items() if above & known} - known:
        known |= below
    for name in known - {base}:
        methods = [part for part in classes[name].body if isinstance(part, ast.FunctionDef)]
        abstract = any("abstractmethod" in ast.dump(mark) for part in methods for mark in part.decorator_list)
        if not name.startswith("_") and not abstract:
            yield Entry(kind, name, _first_line(ast.get_docstring(classes[name])), "svdd")


def _imported() -> Iterator[Entry]:
    for kind, (package, base) in KINDS.items():
        waiting = [getattr(import_module(f"{package}.base"), base)]
        while waiting:
            subclasses = waiting.pop().__subclasses__()
            waiting += subclasses
            for found in subclasses:
                if not inspect.isabstract(found) and not found.__name__.startswith("_"):
                    yield Entry(kind, found.__name__, _first_line(found.__doc__), found.__module__.split(".")[0])


def _first_line(docstring: str | None) -> str:
    return docstring.strip().splitlines()[0] if docstring else ""
