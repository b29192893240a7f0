"""Any Python function as a reward."""

import reprlib
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from svdd import RewardError, UserError
from svdd.rewards.base import Reward
from svdd.rewards.models.pixels import to_pil

__all__ = ["FunctionReward"]


class FunctionReward(Reward):
    """A Python function of your own as a reward, `my_file.my_function`.

    Args:
        function: Dotted name of `function(images, prompts)`: float [n, 3, h, w] in [0, 1] and n texts to n numbers. It
            may return a pair of them and a dict, as rewards for DDPO do; the dict is ignored.
        one_by_one: Call `function(image, prompt)` once per image, with a PIL image and a text, for one number.
        differentiable: Whether gradients flow from the result to `images`; not with `one_by_one`.
        higher_is_better: Whether a higher score is better.

    Raises:
        ValueError: If it is both `one_by_one` and `differentiable`, or the name is not that of a function.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        one_by_one: bool = False,
        differentiable: bool = False,
        higher_is_better: bool = True,
    ) -> None:
        super().__init__()
        if one_by_one and differentiable:
            raise ValueError("one_by_one gives the function a PIL image, which has no gradient: drop one of the two")
        self.function = _find(function) if isinstance(function, str) else function
        self.one_by_one, self.differentiable, self.higher_is_better = one_by_one, differentiable, higher_is_better
        self.label = function.rsplit(".", 1)[-1] if isinstance(function, str) else _name(function)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.label

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the function's score of each image, float32 [n]."""
        if not self.one_by_one:
            return self._numbers(_scores(self.function(images, prompts))).to(images.device)
        pairs = zip(to_pil(images), prompts, strict=True)
        scores = [self._numbers(_scores(self.function(*pair))).item() for pair in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _numbers(self, scores: Any) -> Tensor:
        if isinstance(scores, Tensor):
            return scores.float()
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"function {self.label} returned {reprlib.repr(scores)}, a {type(scores).__name__}"
            expected = "one number" if self.one_by_one else "one number per image"
            raise RewardError(f"{found}; expected {expected}") from error


def _name(function: Callable[..., Any]) -> str:
    """Returns the name of a function, of the function in a partial one, or of the class of another callable."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__)).strip("<>")  # <lambda>


def _scores(returned: Any) -> Any:
    """Returns the scores out of what a function returned, a pair with a dict or just the scores."""
    pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
    return returned[0] if pair else returned


def _find(name: str) -> Callable[..., Any]:
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"function={name!r} cannot be imported: {error}; expected my_file.my_function") from error
    if not callable(found):
        raise UserError(f"function={name!r} is a {type(found).__name__}; expected a function")
    return found
