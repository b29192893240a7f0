"""The classes that can be selected by name, built-in ones, those of plug-ins and a user's own."""

import ast
import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

from svdd import first_line
from svdd.runs.tracebacks import Tracebacks, users_traceback

__all__ = ["KINDS", "Entry", "catalogue", "import_all", "plugins"]

KINDS = {  # kind: (package of the built-ins, base class)
    "diffusion": ("svdd.diffusion", "Diffusion"),
    "sampler": ("svdd.samplers", "Sampler"),
    "value": ("svdd.values", "Value"),
    "reward": ("svdd.rewards", "Reward"),
}
_tracebacks = Tracebacks()


class Entry(NamedTuple):
    """One selectable class: a key of `KINDS`, its name, the first line of its docstring, and its top-level package."""

    kind: str
    name: str
    description: str
    package: str


def plugins() -> list[EntryPoint]:
    """Returns the entry points of the plug-ins that are installed."""
    return list(entry_points(group="svdd.plugins"))


def import_all() -> None:
    """Imports every built-in class and every plug-in; one that fails to import warns after its traceback."""
    for package, _ in KINDS.values():
        folder = import_module(package)
        for name in folder.__all__:
            getattr(folder, name)  # imported on first use
    for plugin in plugins():
        try:
            plugin.load()
        except Exception as error:  # a third-party package can raise anything, and must not stop the others
            source = plugin.dist.name if plugin.dist else plugin.value
            reason = f"{type(error).__name__}: {first_line(error)}"
            _tracebacks.show(users_traceback(error))
            warnings.warn(f"plug-in {plugin.name!r} of {source} was skipped: {reason}", stacklevel=2)


def catalogue(plug_ins: bool = True) -> list[Entry]:
    """Returns all selectable classes, by kind and name; built-in ones are read from their source, not imported.

    Plug-ins are imported, and torch with them, unless `plug_ins` is false.
    """
    entries = {entry for kind in KINDS for entry in _read_sources(kind)}
    if plug_ins and plugins():
        import_all()
        entries |= {entry for kind in KINDS for entry in _read_imported(kind)}
    return sorted(entries, key=lambda entry: (list(KINDS).index(entry.kind), entry))


@cache
def _read_sources(kind: str) -> tuple[Entry, ...]:
    """Returns the concrete built-in classes below the base class of this kind, however far."""
    package, base = KINDS[kind]
    paths = (Path(__file__).parents[1] / package.split(".")[1]).glob("[!_]*.py")
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    parents = {name: {b.id for b in node.bases if isinstance(b, ast.Name)} for name, node in classes.items()}
    known = {base}
    while below := {name for name, above in parents.items() if above & known} - known:
        known |= below
    names = [name for name in known - {base} if not name.startswith("_") and not _is_abstract(name, classes, parents)]
    descriptions = [(ast.get_docstring(classes[name]) or "").partition("\n")[0] for name in names]
    return tuple(Entry(kind, *each, "svdd") for each in zip(names, descriptions, strict=True))


def _is_abstract(name: str, classes: dict[str, ast.ClassDef], parents: dict[str, set[str]]) -> bool:
    """Returns whether a class lacks a method that one of its bases declares as abstract."""
    lineage = [name]
    for each in lineage:  # the list grows by the bases of each
        lineage += [above for above in parents[each] if above in classes and above not in lineage]
    body = [node for each in lineage for node in classes[each].body]
    methods = [node for node in body if isinstance(node, ast.FunctionDef)]
    abstract = {id(node) for node in methods if "abstractmethod" in map(ast.unparse, node.decorator_list)}
    found = {node.name for node in methods if id(node) not in abstract}
    found |= {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign) and node.value is not None}
    return any(node.name not in found for node in methods if id(node) in abstract)


def _read_imported(kind: str) -> Iterator[Entry]:
    """Yields the concrete subclasses of this kind that are imported."""
    package, base = KINDS[kind]
    classes = [getattr(import_module(f"{package}.base"), base)]
    for known in classes:  # the list grows by the subclasses of each
        classes += known.__subclasses__()
        if not inspect.isabstract(known) and not known.__name__.startswith("_"):
            description = (known.__doc__ or "").strip().partition("\n")[0]
            yield Entry(kind, known.__name__, description, known.__module__.partition(".")[0])
