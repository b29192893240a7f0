"""Any Python function as a reward."""

import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from svdd import RewardError, UserError, did_you_mean, first_line, require_at_least
from svdd.rewards.base import Reward, is_device_failure
from svdd.rewards.models.pixels import to_pil

__all__ = ["FunctionReward", "import_path"]

_PROMPTS = ("prompt", "text", "caption")  # in the name of a second parameter that has a default
_HOW = "annotate its first parameter with list[PIL.Image.Image], or PIL.Image.Image for one at a time"


class FunctionReward(Reward):
    """A Python function of your own as a reward, `my_file.my_function`.

    `function(images, prompts)`, or `function(images)`, returns one number per image. A second parameter gets the
    prompts, unless it has a default and another name. The annotation of the first parameter decides what it gets: by
    default a tensor, float [n, 3, h, w] in [0, 1]; PIL images for `list[PIL.Image.Image]`; one PIL image, with one
    prompt, for `PIL.Image.Image`. The function may return a pair of the numbers and a dict, as rewards for DDPO do; the
    dict is ignored.

    Args:
        function: Its dotted name.
        one_by_one: Call the function once per image, with a PIL image and a text; by default as it is annotated.
        differentiable: Whether gradients flow from the result to `images`; not with PIL images.
        higher_is_better: Whether a higher score is better.
        arguments: Further arguments of the function, by name.
        threads: Run it in so many threads beside the device, with tensors on the CPU: for a function that waits for a
            server, or computes without PyTorch. It must be safe to call from several threads. With one picture at a
            time, each thread takes some of the pictures.

    Raises:
        ValueError: If the function takes other arguments, if its name is not that of a function, if PIL images are to
            be differentiable, or if `threads` is negative or given for a differentiable function.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        one_by_one: bool | None = None,
        differentiable: bool = False,
        higher_is_better: bool = True,
        arguments: dict[str, Any] | None = None,
        threads: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(0, threads=threads)
        self.function = _find(function) if isinstance(function, str) else function
        self.label = function.rsplit(".", 1)[-1] if isinstance(function, str) else _name(function)
        self.arguments = dict(arguments or {})
        self.takes_prompts = _check_arguments(self.function, self.label, self.arguments)
        annotation = _annotation(self.function)
        self.one_by_one = _is_picture(annotation) if one_by_one is None else one_by_one
        self.takes_pil = self.one_by_one or any(map(_is_picture, _contents(annotation)))
        self.is_clear = self.takes_pil or annotation is Tensor  # what it gets is what it wants
        if self.takes_pil and differentiable:
            raise ValueError(f"{self.label} takes PIL images, which have no gradient: leave out differentiable")
        if threads and differentiable:
            raise ValueError(f"{self.label} is differentiable, and gradients need it on the device: leave out threads")
        self.differentiable, self.higher_is_better = differentiable, higher_is_better
        self.one_call, self.threads, self.takes_bytes = self.one_by_one, threads, self.takes_pil

    @property
    def name(self) -> str:
        """The function's name."""
        return self.label

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the function's score of each image, float32 [n]."""
        if not self.one_by_one:
            return self._call(to_pil(images) if self.takes_pil else images, prompts).to(images.device)
        scores = [self._call(*pair).item() for pair in zip(to_pil(images), prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _call(self, images: Any, prompts: Any) -> Tensor:
        """Returns what the function returns as a tensor; an error says what the function was given."""
        given = (images, prompts) if self.takes_prompts else (images,)
        try:
            return self._numbers(_scores(self.function(*given, **self.arguments)))
        except UserError:
            raise
        except Exception as error:
            puzzled = isinstance(error, AttributeError | TypeError) or "tensor" in str(error).lower()
            if self.is_clear or not puzzled or is_device_failure(error):
                raise
            what = f"reward {self.label} failed with {type(error).__name__}: {first_line(error)}"
            got = f"it got a float tensor {list(images.shape)}; if it takes PIL images, {_HOW}"
            raise RewardError(f"{what} ({got})") from error

    def _numbers(self, scores: Any) -> Tensor:
        if isinstance(scores, Tensor):
            return scores.float()
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"function {self.label} returned {reprlib.repr(scores)}, a {type(scores).__name__}"
            expected = "one number" if self.one_by_one else "one number per image"
            raise RewardError(f"{found}; expected {expected}") from error


def import_path(path: str) -> Any:
    """Imports what a dotted path names: a module, or an attribute of one at any depth.

    Raises:
        ModuleNotFoundError: If there is no such module.
        AttributeError: If the module does not have it.
        Exception: Any that the module raises.
    """
    module, _, name = path.rpartition(".")
    if not module:
        return import_module(path)
    attributes = [name]
    while True:
        try:
            found: Any = import_module(module)
            break
        except ModuleNotFoundError as error:
            if "." not in module or error.name != module:
                raise
            module, _, name = module.rpartition(".")
            attributes.insert(0, name)
    for name in attributes:
        found = getattr(found, name)
    return found


def _name(function: Callable[..., Any]) -> str:
    """Returns the name of a function, of the function in a partial one, or of the class of another callable."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__)).strip("<>")  # <lambda>


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what states the arguments: of a module its `forward`, since a module itself takes any."""
    return function.forward if isinstance(function, nn.Module) else function


def _scores(returned: Any) -> Any:
    """Returns the scores out of what a function returned, a pair with a dict or just the scores."""
    pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
    return returned[0] if pair else returned


def _find(name: str) -> Callable[..., Any]:
    expected = "expected my_file.my_function"
    try:
        found = import_path(name)
    except Exception as error:
        why = first_line(error) if name.startswith(str(getattr(error, "name", None))) else ""
        why = why or f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"function={name!r} cannot be imported: {why}; {expected}") from error
    if not callable(found):
        raise UserError(f"function={name!r} is a {type(found).__name__}; expected a function")
    return found


def _check_arguments(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> bool:
    """Returns whether the function takes prompts; raises ValueError if it cannot be called with the arguments."""
    try:
        signature = inspect.signature(_called(function))
    except ValueError:  # of some built-in functions
        return True
    parameters = list(signature.parameters.values())
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    second = next(iter(positional[1:]), None)
    takes_prompts = any(each.kind == each.VAR_POSITIONAL for each in parameters) or (
        second is not None
        and second.name not in arguments
        and (second.default is second.empty or any(word in second.name for word in _PROMPTS))
    )
    given = ["images", "prompts"][: 1 + takes_prompts]
    try:
        signature.bind(*given, **arguments)
        return takes_prompts
    except TypeError as error:
        problem = str(error)
    named = [*positional[len(given) :], *(each for each in parameters if each.kind == each.KEYWORD_ONLY)]
    known = [each.name for each in sorted(named, key=lambda each: each.default is not each.empty)]
    if unknown := [key for key in arguments if key not in known]:
        problem = f"it has no argument {unknown[0]!r}{did_you_mean(unknown[0], known, ', ')}"
    called = ", ".join([*given, *(f"{key}={value!r}" for key, value in arguments.items())])
    how = f"it takes by name, in `arguments`: {', '.join(known)}" if known else "it takes no more by name"
    raise ValueError(f"{name}{signature} cannot be called as {name}({called}): {problem}; {how}")


def _annotation(function: Callable[..., Any]) -> Any:
    """Returns the annotation of the first parameter, of several alternatives the first; a text if it has no meaning."""
    try:
        signature = inspect.signature(_called(function), eval_str=True)
    except Exception:  # a name that is imported for type checkers only, or a built-in function
        try:
            signature = inspect.signature(_called(function))
        except ValueError:
            return inspect.Parameter.empty
    first = next(iter(signature.parameters.values()), None)
    found = inspect.Parameter.empty if first is None else first.annotation
    return typing.get_args(found)[0] if typing.get_origin(found) in (typing.Union, types.UnionType) else found


def _is_picture(annotation: Any) -> bool:
    """Whether an annotation is PIL's image class, the module of the same name, or a text that ends with that name."""
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] == "Image"
    return annotation is Image or (isinstance(annotation, type) and issubclass(annotation, Image.Image))


def _contents(annotation: Any) -> tuple[Any, ...]:
    """Returns of what an annotation is a list."""
    if isinstance(annotation, str):
        return (annotation.partition("[")[2].removesuffix("]"),)
    return typing.get_args(annotation)
