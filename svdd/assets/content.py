"""Digests of what images and scores depend on beyond the settings: weights, what else files hold, and users' code."""

import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest", "sources"]

_INSTALLED = tuple(
    f"{Path(path).resolve()}{os.sep}"
    for path in (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "platstdlib", "platlib")))
)
_TOKENIZER = (  # attributes that bear on the tokens
    *("model_max_length", "chat_template", "padding_side", "truncation_side", "do_lower_case"),
    "clean_up_tokenization_spaces",
)


def digest(module: nn.Module, deep: bool = True) -> str:
    """Returns a digest of a module: its weights, and the configurations, tokenizers and processors in its parts.

    An attribute whose name is in the `from_files` of a part counts too. Lazily loaded parts must be loaded. Takes about
    a second per gigabyte and CPU core. Without `deep`, its submodules do not count.
    """
    own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    state = {name: tensor for name, tensor in module.state_dict().items() if deep or name in own}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        found: list[Any] = [*zip(state, pool.map(_hash_tensor, state.values()), strict=True)]
    found += [(name, *_facts(part)) for name, part in module.named_modules() if deep or part is module]
    return _hash(json.dumps(found, sort_keys=True).encode())


def sources(*objects: Any) -> dict[str, str]:
    """Returns digests of the source files, by module, that define the objects, parts of these, and functions in them.

    They include the modules that a user's own module imports, also within functions, but not those of svdd, of Python
    and of libraries; an installed plug-in counts with the file of its class. Code without a file, such as a notebook's,
    is left out.
    """
    waiting = sorted({name for found in objects for part in _parts(found) for name in _modules_of(part)})
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in found or file is None:
            continue
        with suppress(OSError):
            found[name] = _hash(Path(file).read_bytes())
        if not _is_installed(name):
            waiting += sorted(other for other in _imports(name, file) if not _is_installed(other))
    return {name: found[name] for name in sorted(found)}


def _hash(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_tensor(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return str(tensor)
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    numbers = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {_hash(numbers)}"


def _facts(part: nn.Module) -> Iterator[Any]:
    """Yields, as JSON data, what a part has read from files beyond its weights."""
    yield from (_public(getattr(part, name)) for name in getattr(part, "from_files", ()))
    for value in vars(part).values():
        for held in value.values() if isinstance(value, dict) else (value,):
            for piece in (held, getattr(held, "tokenizer", None), getattr(held, "image_processor", None)):
                if hasattr(piece, "get_vocab") and hasattr(piece, "model_max_length"):
                    yield [_tokenizer(piece), *(getattr(piece, name, None) for name in _TOKENIZER)]
                elif hasattr(piece, "image_mean") and hasattr(piece, "to_dict"):
                    yield _public(piece)
    for name in ("config", "peft_config"):
        if isinstance(config := getattr(part, name, None), Mapping) or hasattr(config, "to_dict"):
            yield _public(config)


def _tokenizer(tokenizer: Any) -> Any:
    """Returns the words and the rules of a tokenizer, without the state of its last call."""
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        return _hash(json.dumps({k: v for k, v in rules.items() if k not in ("truncation", "padding")}).encode())
    return sorted(tokenizer.get_vocab().items())


def _public(config: Any) -> Any:
    """Returns a configuration as JSON data, without names of folders and versions of libraries."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(config, Mapping):
        left_out = ("_version", "dtype", "name_or_path")  # the ends of names
        kept = {str(k): v for k, v in config.items() if not str(k).startswith("_") and not str(k).endswith(left_out)}
        return {name: _public(value) for name, value in kept.items()}
    if isinstance(config, list | tuple):
        return [_public(entry) for entry in config]
    return str(config) if config is None or isinstance(config, str | int | float) else type(config).__name__


def _parts(found: Any) -> list[Any]:
    return list(found.modules()) if isinstance(found, nn.Module) else [found]


def _modules_of(part: Any) -> Iterator[str]:
    """Yields the modules that define the classes of a part, and the functions that it holds, without libraries'."""
    ours = type(part).__module__.startswith("svdd.")
    for cls in type(part).__mro__:
        if not cls.__module__.startswith("svdd.") and (_derived(cls) or not _is_installed(cls.__module__)):
            yield cls.__module__
    for value in getattr(part, "__dict__", {}).values():
        if callable(value) and not isinstance(value, nn.Module | type):
            home = _home(inspect.unwrap(getattr(value, "func", value)))
            named = ours and inspect.isroutine(value) and not home.startswith("svdd.")  # for FunctionReward
            if named or not _is_installed(home):
                yield home


def _derived(cls: type) -> bool:
    return any(base.__module__.startswith("svdd.") for base in cls.__mro__)


def _home(value: Any) -> str:
    """Returns the name of the module that a value is, or that defines it or its class."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else type(value).__module__


def _imports(name: str, file: str) -> set[str]:
    """Returns the modules that the source of a module names in `import` statements, and the packages around them."""
    package, found = name if Path(file).stem == "__init__" else name.rpartition(".")[0], set()
    with suppress(OSError, SyntaxError, ValueError):  # a compiled module
        for node in ast.walk(ast.parse(Path(file).read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                with suppress(ImportError):  # beyond the top-level package
                    base = resolve_name("." * node.level + (node.module or ""), package)
                    found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {whole.rsplit(".", cut)[0] for whole in found for cut in range(whole.count(".") + 1)}


def _file_of(name: str) -> str | None:
    """Returns the file of a module, which need not have been imported yet; None if there is none."""
    if name not in sys.modules and "." in name and _is_installed(name.partition(".")[0]):
        return None
    with suppress(ImportError, AttributeError, ValueError):
        spec = getattr(sys.modules[name], "__spec__", None) if name in sys.modules else find_spec(name)
        return getattr(sys.modules.get(name), "__file__", None) or getattr(spec, "origin", None)
    return None


def _is_installed(name: str) -> bool:
    """Whether a module belongs to svdd, to Python or to an installed package, or has no file."""
    file = _file_of(name)
    if file is None:
        return True
    path = Path(file).resolve()  # libraries may belong to another environment, as in a venv with system packages
    return str(path).startswith(_INSTALLED) or bool({"site-packages", "dist-packages"} & {*path.parts})
