"""Steer text-to-image diffusion models with any reward, at inference time, without training or gradients."""

import os
import sys

_AS_MODULE = sys.argv[:1] == ["-m"] and bool({"svdd", "-msvdd"} & {*sys.orig_argv})  # python -m svdd
if _AS_MODULE and not getattr(sys.flags, "safe_path", False):
    sys.path.append(sys.path.pop(0))  # a json.py in the working directory must not be imported
if _AS_MODULE or os.path.basename("".join(sys.argv[:1])) in ("svdd", "svdd.exe"):
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the command without a traceback, until `main` listens

import re
import reprlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from svdd.diffusion import StableDiffusion as StableDiffusion
    from svdd.evaluation.image_grid import image_grid as image_grid
    from svdd.guided_diffusion import GuidedDiffusion as GuidedDiffusion

__getattr__, _, __all__ = lazy_loader.attach(  # imports on first use, so that `import svdd` stays fast
    __name__,
    ["diffusion", "rewards", "samplers", "state", "values"],
    {
        "diffusion.stable_diffusion": ["StableDiffusion"],
        "evaluation.image_grid": ["image_grid"],
        "guided_diffusion": ["GuidedDiffusion"],
    },
)
__all__ += [
    "Incomplete",
    "NotFinite",
    "RewardError",
    "Stopped",
    "UserError",
    "did_you_mean",
    "first_line",
    "is_out_of_memory",
    "missing_methods",
    "printable",
]
__dir__ = __all__.copy

try:
    __version__ = version("svdd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

SUMMARY_FILE = "summary.json"  # in a run folder; rewards may read it, and know nothing else of runs


class UserError(ValueError):
    """An error that the user can fix; the message says what came, what was expected and what to do (exit code 2)."""


class NotFinite(UserError):
    """A network returned NaN or infinity; other prompts may work."""


class RewardError(UserError):
    """A reward failed, or returned something other than one finite number per image."""


class Stopped(SystemExit):
    """The run ends early because of a signal or a failed process; the same command continues it."""


class Incomplete(SystemExit):
    """The run is complete except for prompts that failed; the same command tries them again."""


def missing_methods(cls: type) -> str:
    """Returns one line about the abstract methods that a class does not implement; empty if it implements all."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    owners = [next(base.__name__ for base in cls.__mro__ if name in vars(base)) for name in missing]
    names = ", ".join(f"{owner}.{name}" for owner, name in zip(owners, missing, strict=True))
    return f"{cls.__name__} does not implement {names}" if names else ""


def first_line(error: object) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_OUT_OF_MEMORY = (  # of CUDA, XPU and MPS, PyTorch's CPU allocator, the C++ library, the system
    *("out of memory", "out_of_memory", "out_of_device_memory", "out_of_host_memory"),
    *("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc"),
    *("could not create a primitive", "could not create a memory object"),  # oneDNN, whose status has no more words
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a lack of memory caused the error, or one that it was raised from.

    Devices differ in the type: CUDA and XPU raise torch.OutOfMemoryError, MPS and PyTorch's CPU allocator RuntimeError,
    Python, NumPy and the C++ library MemoryError, and the system OSError.
    """
    torch, message = sys.modules.get("torch"), str(error).lower()
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError | OSError) and any(words in message for words in _OUT_OF_MEMORY):
        return "primitive desc" not in message  # such an operation is not implemented
    cause = error.__cause__ or error.__context__
    return cause is not None and is_out_of_memory(cause)


_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Returns a text without what could act on a terminal: control characters and bidirectional overrides are escaped.

    Tabs and ends of lines stay.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(text: object, error: bool = False) -> None:
    """Prints a message, which may quote what others have written, to stdout or stderr."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def did_you_mean(name: str, known: Iterable[str], separator: str = "; ") -> str:
    """Returns `separator` and a hint at the known name most similar to `name`; empty if none is close."""
    from difflib import get_close_matches

    lowered = {candidate.lower(): candidate for candidate in known}
    match = get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"{separator}did you mean {lowered[match[0]]!r}?" if match else ""


def is_integer(number: object) -> bool:
    """Whether a number is an integer by its type; numpy's are, True and 8.0 are not."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def is_number(number: object) -> bool:
    """Whether a number is real by its type, NaN and infinity included; True is not."""
    return isinstance(number, Real) and not isinstance(number, bool)


def require_at_least(least: int, **numbers: int) -> None:
    """Raises ValueError for the first that is no integer, or below `least`."""
    for name, number in numbers.items():
        if not is_integer(number):
            raise ValueError(f"{name} must be an integer >= {least}, got {described(number)}")
        if number < least:
            raise ValueError(f"{name} must be >= {least}, got {number}")


def require_numbers(**numbers: float) -> None:
    """Raises ValueError for the first that `is_number` refuses."""
    for name, number in numbers.items():
        if not is_number(number):
            raise ValueError(f"{name} must be a number, got {described(number)}")


def described(argument: object) -> str:
    """Returns an argument of the wrong type as text, with its type."""
    return f"{reprlib.repr(argument)} ({type(argument).__name__})"


def check_bound(what: str, number: int, most: int, advice: str, error: type[UserError] = UserError) -> None:
    """Raises an error if a number is above its limit; most limits are in `svdd.runs.bounds`."""
    if number > most:
        raise error(f"{what}: {number} is above the limit of {most}; {advice}")
