"""Constructors, read from source: the arguments of a class, with their types, defaults and help, without an import."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import parse
from docstring_parser.common import DocstringStyle

__all__ = ["Parameter", "parameters", "words_of"]

_WORDS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "bool": "true|false", "_PATH": "PATH", "_LITERAL_WARN": "warn"}
_WORDS |= {"_PRECISION_INPUT": "TEXT", "None": "", "timedelta": "", "dict": "", "Any": "TEXT"}


class Parameter(NamedTuple):
    """An argument of a constructor: its name, its type in the words of a help page, its help, and its default."""

    name: str
    kind: str
    help: str
    default: Any  # `...` if it has none


@cache
def parameters(path: str) -> tuple[Parameter, ...]:
    """Returns the arguments of a class by its dotted path; those of its bases too, where it hands them on."""
    module, name = _origin(path)
    tree = _tree(module)
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    helps = {
        each.arg_name: " ".join((each.description or "").split())
        for docstring in (ast.get_docstring(node), init and ast.get_docstring(init))
        for each in (parse(docstring, DocstringStyle.GOOGLE).params if docstring else ())
    }
    assigned = [each for each in tree.body if isinstance(each, ast.Assign)]
    aliases = {target.id: each.value for each in assigned for target in each.targets if isinstance(target, ast.Name)}
    given = _fields(node) if init is None else _arguments(init)
    typed = ((each, ast.unparse(_Aliases(aliases).visit(kind)), value) for each, kind, value in given)
    own = [Parameter(each, words_of(kind), helps.get(each, ""), value) for each, kind, value in typed]
    taken = {each.name for each in own}
    if init is None or init.args.kwarg is not None:
        for base in _bases(node, module, tree):
            own += [each for each in parameters(base) if each.name not in taken]
    return tuple(own)


def words_of(annotation: str) -> str:
    """Returns a type as a help page shows it, such as `INT`, `NAME` for a class, or `a|b`; null is not shown."""
    words = list(dict.fromkeys(_words(ast.parse(annotation, mode="eval").body)))
    if "NAME" in words and "TEXT" in words:
        words.remove("TEXT")
    return "|".join(words)


def _origin(path: str) -> tuple[str, str]:
    """Returns the module that defines a class, and its name there; a folder's stub says where its classes are."""
    module, _, name = path.rpartition(".")
    stub = _file(module).with_suffix(".pyi")
    for node in ast.parse(stub.read_text("utf-8")).body if stub.is_file() else ():
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return f"{module}.{node.module}", name
    return module, name


def _file(module: str) -> Path:
    top, *rest = module.split(".")
    spec = find_spec(top)  # of a top-level package: imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{top} is not installed")
    path = Path(spec.submodule_search_locations[0], *rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _bases(node: ast.ClassDef, module: str, tree: ast.Module) -> Iterator[str]:
    """Yields the paths of the bases of a class that svdd defines."""
    here = {part.name: f"{module}.{part.name}" for part in tree.body if isinstance(part, ast.ClassDef)}
    for part in tree.body:
        if isinstance(part, ast.ImportFrom) and str(part.module).startswith("svdd"):
            here |= {alias.asname or alias.name: f"{part.module}.{alias.name}" for alias in part.names}
    yield from (here[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in here)


class _Aliases(ast.NodeTransformer):
    """Puts the types that a module has given names in the place of the names."""

    def __init__(self, aliases: dict[str, ast.expr]) -> None:
        self._aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Returns what the name stands for."""
        return self._aliases.get(node.id, node)


def _arguments(init: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, Any]]:
    """Yields the name, the type and the default of each argument of a constructor."""
    given, positional = init.args, init.args.args[1:]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    for argument, default in pairs:
        yield argument.arg, argument.annotation or ast.Constant(None), _value(default)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, Any]]:
    """Yields the same of the fields of a dataclass; nothing for another class."""
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation):
            value = part.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
                options = {each.arg: each.value for each in value.keywords}
                if "init" in options:
                    continue
                value = options.get("default", options.get("default_factory"))
            yield ast.unparse(part.target), part.annotation, _value(value)


def _value(node: ast.expr | None) -> Any:
    if node is None:
        return ...
    try:
        return ast.literal_eval(node)
    except ValueError:  # a constant's name, or an expression
        return ast.unparse(node)


def _words(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(None):
            return
        case ast.Constant(str() as text):  # a type in quotes
            yield from _words(ast.parse(text, mode="eval").body)
        case ast.BinOp(left, ast.BitOr(), right):
            yield from _words(left)
            yield from _words(right)
        case ast.Subscript(ast.Name("Optional" | "Union"), inner):
            for each in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                yield from _words(each)
        case ast.Subscript(ast.Name("Literal"), inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            yield from (str(ast.literal_eval(value)) for value in values)
        case ast.Subscript(ast.Name("list" | "Iterable" | "Sequence"), inner):
            yield f"[{words_of(ast.unparse(inner))}, ...]"
        case ast.Subscript(outer, _):
            yield from _words(outer)
        case _:
            if word := _WORDS.get(ast.unparse(node), "NAME"):
                yield word
