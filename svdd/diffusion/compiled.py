"""Modules whose calls `torch.compile` compiles once for any number of rows.

The rows of a run vary: starts, candidates, halves of guidance, last batches and chunks that are smaller. So the first
dimension is dynamic from the first call on: one graph serves two rows or more, a second one a single row, for which
PyTorch always compiles another. Gradient, inference mode, autocast and further shapes (texts of other length) have
graphs of their own. Compared with padding to a few fixed numbers of rows, no row is computed in vain.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svdd import first_line
from svdd.diffusion.twins import blocks_of, is_unet

__all__ = ["Backend", "compile_calls", "compile_network"]

Backend = str | Callable[..., Any]  # of torch.compile
DEFAULT: Backend = "inductor"


def compile_network(network: nn.Module, deterministic: bool = False) -> None:
    """Compiles a UNet as a whole, and a transformer block by block; see `compile_calls`.

    The blocks of a transformer share one graph, which takes a fraction of the time to compile. Evaluations that record
    or reuse features call the same blocks.
    """
    compile_calls([network] if is_unet(network) else blocks_of(network) or [network], deterministic)


def compile_calls(modules: Sequence[nn.Module], deterministic: bool = False) -> None:
    """Compiles the calls of modules, in place; their weights, the names of these, and copies stay as they are.

    Modules of one class share their graphs. Gradients of the weights, which sampling never needs, are switched off: a
    compiled backward pass would compute them.

    Args:
        modules: Modules whose arguments are tensors with one row per latent, and others.
        deterministic: Whether the compiler may choose no kernel by its speed.
    """
    calls: dict[type, _Compiled] = {}
    for module in modules:
        kind = type(module)
        module.requires_grad_(False)
        module._compiled_call_impl = partial(calls.setdefault(kind, _Compiled(kind.__name__, deterministic)), module)


class _Compiled:
    """The call of modules of one class, compiled; as it is, with a warning, where that is impossible."""

    def __init__(self, name: str, deterministic: bool) -> None:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)

        call.__code__ = call.__code__.replace()  # PyTorch keeps graphs, a limited number, by code object
        self._name, self._compiled = name, torch.compile(call, backend=_backend(deterministic))
        self._possible = True
        self._known: set[Any] = set()  # calls for which a graph exists

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        key = id(module), _surroundings(), *(_kind(leaf) for leaf in leaves)
        with _gate.shared() if key in self._known else _gate.alone():
            result = self._evaluate([leaf for leaf in leaves if isinstance(leaf, Tensor)], module, *args, **kwargs)
            self._known.add(key)
        return result

    def _evaluate(self, tensors: list[Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._possible:
            return module._call_impl(*args, **kwargs)
        rows = next((len(tensor) for tensor in tensors if tensor.ndim), 0)
        for tensor in tensors:
            if tensor.ndim and len(tensor) == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            with _guards.checked():
                return self._compiled(module, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            result = module._call_impl(*args, **kwargs)  # a mistake in the arguments shows here
            self._possible = False
            what = f"compile: a {self._name} cannot be compiled here and is computed without"
            warnings.warn(f"{what}: {first_line(error)}", stacklevel=2)
            return result


def _backend(deterministic: bool) -> Callable[..., Any]:
    """Returns the default backend, whose graphs let other threads look for theirs when they begin."""
    make: Any = torch._dynamo.lookup_backend(DEFAULT) if isinstance(DEFAULT, str) else DEFAULT
    if deterministic and DEFAULT == "inductor" and hasattr(import_module("torch._inductor.config"), "deterministic"):
        make = partial(make, config_patches={"deterministic": True})

    def compile(graph: Any, inputs: Any) -> Callable[..., Any]:
        compute = make(graph, inputs)

        @wraps(compute)
        def run(*args: Any) -> Any:
            _guards.release()
            return compute(*args)

        return run

    return compile


def _surroundings() -> tuple[Any, ...]:
    """Returns what PyTorch compiles anew for, besides the arguments."""
    autocast = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    return *modes, torch.get_num_threads(), *autocast


def _kind(leaf: Any) -> Any:
    """Returns what PyTorch may compile anew for in an argument."""
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)
    return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_inference()


class _Gate:
    """Lets calls run at once, but a compilation alone: PyTorch refuses compiled calls while another thread compiles."""

    def __init__(self) -> None:
        self._condition, self._running = threading.Condition(), 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._running == 0)
            yield


class _Guards:
    """Lets one thread at a time look for its graph: PyTorch compiles a graph again if two threads do so at once."""

    def __init__(self) -> None:
        self._lock, self._state = threading.Lock(), threading.local()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Excludes other threads until the graph begins."""
        if getattr(self._state, "held", False):
            yield
            return
        self._lock.acquire()
        self._state.held = True
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        if getattr(self._state, "held", False):
            self._state.held = False
            self._lock.release()


_gate, _guards = _Gate(), _Guards()
