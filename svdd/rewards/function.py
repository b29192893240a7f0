"""Any Python function as a reward."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from svdd import UserError
from svdd.rewards.base import Reward
from svdd.rewards.models.pixels import to_pil

__all__ = ["FunctionReward"]


class FunctionReward(Reward):
    """A Python function of your own as a reward, `my_file.my_function`.

    Args:
        function: Dotted name of `function(images, prompts)`: float [n, 3, h, w] in [0, 1] and n texts to n numbers.
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
        self.label = function.rsplit(".", 1)[-1] if isinstance(function, str) else getattr(function, "__name__", "call")

    @property
    def name(self) -> str:
        """The function's name."""
        return self.label

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the function's score of each image, float32 [n]."""
        if self.one_by_one:
            scores: Any = [float(self.function(*pair)) for pair in zip(to_pil(images), prompts, strict=True)]
        else:
            scores = self.function(images, prompts)
        return torch.as_tensor(scores, dtype=torch.float32, device=images.device)


def _find(name: str) -> Callable[..., Any]:
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"function={name!r} cannot be imported: {error}; expected my_file.my_function") from error
    if not callable(found):
        raise UserError(f"function={name!r} is a {type(found).__name__}; expected a function")
    return found
