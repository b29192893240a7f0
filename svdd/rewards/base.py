"""The base class of all rewards, and what identifies one."""

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdd import RewardError, UserError, first_line, is_out_of_memory
from svdd.rewards.columns import require_columns

__all__ = ["CORES", "Reward", "full_precision", "is_device_failure", "sparing", "sparing_rewards", "to_bytes"]

CORES = min(32, os.cpu_count() or 1)  # threads of a reward that computes on the CPU

# Arguments that do not change the result; the later lines hold those of an endpoint.
_NO_EFFECT = {"self", "batch_size", "local_files_only", "one_by_one", "threads"}
_NO_EFFECT |= {"endpoint", "api_key", "api_key_env", "password", "token"}
_NO_EFFECT |= {"backoff", "concurrency", "retries", "timeout"}

_UNSTATED = {("revision", None), ("dtype", "float32"), ("label", "")}  # arguments that the identity leaves out

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of devices


class Reward(nn.Module, ABC):
    """Scores images: one number per image. A subclass implements `forward` and sets the attributes that differ.

    Attributes:
        differentiable: Whether gradients flow from the scores to the images.
        higher_is_better: Must be True to guide; False for a held-out error, whose lowest score is the best.
        range: The lowest and the highest possible score.
        variant: Which of the class's rewards this is, for its name; empty if there is only one.
        one_call: Whether a score never depends on the other images of a call, to the last bit; then one call may score
            several prompts' images in the reproducible mode too.
        groupwise: Whether a score depends on the other images of the call, as a rank does. A call then holds exactly
            one group: the rows of one image that compete at a step, or the finished images of one prompt.
        threads: In how many threads beside the device `forward` may run at once, with images on the CPU; 0: it runs on
            the device, which waits for nothing else. A reward that computes without PyTorch or waits for a server sets
            it; it must be safe to call from several threads, and have no gradient. The rows of a call are spread over
            the threads if `one_call` is true.
        takes_bytes: Whether `forward` takes images as uint8 too, 0 to 255, as it then gets them in threads.
        from_files: Names of attributes, beyond weights and tokenizers, that were read from files: a run continues only
            while they and the reward's source are the same.
        columns: Names of columns of the prompt file that the reward needs: see `svdd.rewards.columns`.
        optional_columns: Names of columns that it reads if they are there.
        path_columns: Those of both that hold paths of files.
        check_prompt: A method that raises UserError for a prompt, with its columns, whose images it cannot score. It is
            called for all prompts before anything is drawn.
    """

    differentiable: bool = False
    higher_is_better: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)
    variant: str = ""
    one_call: bool = False
    groupwise: bool = False
    threads: int = 0
    takes_bytes: bool = False
    from_files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    path_columns: tuple[str, ...] = ()
    check_prompt: Callable[[str], None] | None = None

    @property
    def name(self) -> str:
        """The reward's name in results: that of its class, and the variant."""
        return f"{type(self).__name__}-{self.variant}" if self.variant else type(self).__name__

    @property
    def identity(self) -> Any:
        """The name, and the constructor arguments that the scores depend on, as plain data.

        A revision or label is left out if none is set, and a dtype if it is float32.
        """
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in _NO_EFFECT]
        plain = {name: _plain(getattr(self, name)) for name in names if hasattr(self, name)}
        own = {
            name: value
            for name, value in plain.items()
            if value is not ... and not (isinstance(value, str | None) and (name, value) in _UNSTATED)
        }
        return {"name": self.name, **own} if own else self.name

    def load(self) -> None:
        """Loads the weights of this reward and its parts now; otherwise the first score does."""
        for module in self.modules():
            if isinstance(module, Reward) and module is not self:
                module.load()

    def run_like(self, *parts: "Reward") -> None:
        """Lets this reward, which only calls those, be called as all of them may be: from threads, in one call."""
        self.one_call = all(part.one_call for part in parts)
        self.threads = min(part.threads for part in parts)
        self.takes_bytes = all(part.takes_bytes for part in parts)

    @abstractmethod
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns one score per image, float [n], from images, float32 [n, 3, h, w] in [0, 1], and their n prompts."""

    def prepare(self, images: Tensor) -> Tensor:
        """Returns images, on their device, as a thread takes them: as bytes, if possible, of which fewer are copied."""
        return to_bytes(images) if self.takes_bytes else images.detach()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the scores of `forward` as float32 [n]; it gets float32 images, and runs in `full_precision`.

        Raises:
            RewardError: If there is not one prompt per image, if the images or the scores are not finite, one score per
                image, or `forward` failed, unless the device did.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            found = f"the text {str(prompts)!r}" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise RewardError(
                f"reward {self.name} needs a list of one prompt for each of {len(images)} images, got {found}"
            )
        require_columns(self.name, self.columns, prompts)
        spoilt, late = (
            ~images.detach().flatten(1).sum(1, dtype=torch.float32).isfinite(),
            _is_asynchronous(images.device),
        )
        if not late:  # otherwise it is read with the scores, so that a device is waited for once
            self._refuse_images(spoilt, prompts)
        try:
            with full_precision():
                whole = self.takes_bytes and images.dtype == torch.uint8
                scores = self(images if whole else images.float(), list(prompts))
        except Exception as error:
            if late and not is_device_failure(error):
                self._refuse_images(spoilt, prompts)
            if isinstance(error, UserError) or is_device_failure(error):
                raise
            raise RewardError(f"reward {self.name} failed with {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(scores, Tensor):
            returned = f"a {type(scores).__name__}"
        elif scores.shape != (len(images),):
            returned = f"shape {list(scores.shape)}"
        else:
            unfit = ~scores.detach().float().isfinite()
            if not (spoilt.any() | unfit.any().to(spoilt.device)):
                return scores.float()
            self._refuse_images(spoilt, prompts)
            bad = unfit.nonzero()
            first = prompts[int(bad[0])]
            returned = f"NaN or infinity for {len(bad)} of {len(images)} images, first for the prompt {first!r}"
        expected = f"expected a tensor of shape [{len(images)}], one finite score per image"
        raise RewardError(f"reward {self.name} returned {returned}; {expected}")

    def _refuse_images(self, spoilt: Tensor, prompts: Sequence[str]) -> None:
        """Raises RewardError if one of the images, bool [n], is not finite."""
        if len(bad := spoilt.nonzero()):
            first = f"{len(bad)} of {len(spoilt)} images, first for the prompt {prompts[int(bad[0])]!r}"
            help = "a decoder in float16 may overflow: set --trainer.precision to bf16-true or 32-true"
            raise RewardError(f"reward {self.name} received NaN or infinity in {first}; {help}")


def to_bytes(images: Tensor) -> Tensor:
    """Returns images as uint8 [n, 3, h, w], from float [n, 3, h, w] clamped to [0, 1]; uint8 images as they are."""
    if images.dtype == torch.uint8:
        return images
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches autocast off and makes float32 the default type of new tensors, which a Trainer's precision changes."""
    before = torch.get_default_dtype()
    with ExitStack() as around:
        for kind in filter(torch.is_autocast_enabled, _AUTOCAST):
            around.enter_context(torch.autocast(kind, enabled=False))
        if before != torch.float32:  # one for all threads, which must not set it needlessly
            around.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        yield


def sparing_rewards(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a conversion of the module's tensors that moves those of its rewards, but does not cast them.

    A module that holds rewards uses it in `_apply`, so that a Trainer's precision leaves the rewards as they are.
    """
    rewards = [part for part in module.modules() if isinstance(part, Reward)]
    return sparing((tensor for reward in rewards for tensor in (*reward.parameters(), *reward.buffers())), convert)


def sparing(tensors: Iterable[Tensor], convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the conversion, but one that moves these tensors without a cast."""
    kept = {id(tensor) for tensor in tensors}

    def converted(tensor: Tensor) -> Tensor:
        target = convert(tensor.new_empty(0)) if id(tensor) in kept else tensor
        return convert(tensor) if target.dtype == tensor.dtype else tensor.to(target.device)

    return converted


def is_device_failure(error: Exception) -> bool:
    """Whether the device or a lack of memory, not the reward, caused the error or one that it was raised from."""
    failed = isinstance(error, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    named = isinstance(error, RuntimeError) and "cuda error" in str(error).lower()
    cause = error.__cause__ or error.__context__
    return failed or named or is_out_of_memory(error) or (isinstance(cause, Exception) and is_device_failure(cause))


def _is_asynchronous(device: torch.device) -> bool:
    """Whether reading a number from the device waits for all that it still computes."""
    return device.type != "cpu"


def _plain(value: Any) -> Any:
    """Returns the value as JSON data, or an ellipsis if it has no such form."""
    if hasattr(value, "identity"):
        return value.identity
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        path = os.path.expanduser(value)  # may move, but not be renamed; unlike Path, takes any text
        return Path(path).name if os.path.exists(path) else str(value)
    if isinstance(value, dict):
        named = {str(key): _plain(part) for key, part in value.items()}
        return ... if ... in named.values() else named
    if isinstance(value, list | tuple | nn.ModuleList):
        parts = [_plain(part) for part in value]
        return ... if ... in parts else parts
    return f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) else ...
