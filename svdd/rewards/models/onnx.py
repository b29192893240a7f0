"""Networks of onnxruntime: their digest, and sessions that belong to one process."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from svdd import UserError

__all__ = ["PerProcess", "digest_of_file", "in_threads", "require_package"]

_lock = threading.RLock()  # of several threads, one builds
Built = TypeVar("Built")
Item = TypeVar("Item")
Result = TypeVar("Result")


class PerProcess(Generic[Built]):
    """An object that each process builds at first use. Copies and pickles leave it out, as a fork cannot use it."""

    def __init__(self, build: Callable[..., Built], *arguments: Any) -> None:
        self.build, self.arguments = build, arguments
        self.held: tuple[int, Built] | None = None

    def get(self) -> Built:
        """Returns this process's object."""
        if (held := self.held) is None or held[0] != os.getpid():
            with _lock:
                if (held := self.held) is None or held[0] != os.getpid():
                    self.held = held = (os.getpid(), self.build(*self.arguments))
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"held": None}


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns the result for each item, computed in as many threads as PyTorch uses.

    With sessions of one thread each, the results do not depend on the number of threads.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def require_package(name: str, extra: str) -> Any:
    """Imports a package of an extra; raises UserError that names the extra if it, or what it needs, is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        missing = f"needs the package {name}, which cannot be imported ({error})"
        raise UserError(f"{missing}: pip install 'svdd[{extra}]'") from error


def digest_of_file(path: Path) -> str:
    """Returns a digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
