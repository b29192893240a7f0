"""What stands for a reward in Python: a reward, or any callable."""

import reprlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from svdd import UserError
from svdd.rewards.base import Reward
from svdd.rewards.function import FunctionReward

__all__ = ["RewardLike", "as_reward", "check_rewards"]

if TYPE_CHECKING:
    RewardLike = Reward | Callable[[Tensor, list[str]], Any]
else:  # the command line offers the subclasses of Reward
    RewardLike = Reward

_EXPECTED = "expected a reward, such as CLIPScore(), or a function of images and prompts"


def as_reward(given: Any, name: str = "reward") -> Reward:
    """Returns a reward as it is and any other callable as a `FunctionReward`; UserError for anything else."""
    if isinstance(given, Reward):
        if "_modules" not in vars(given):
            raise UserError(f"{type(given).__name__}.__init__ must begin with super().__init__()")
        return given
    if isinstance(given, type):
        raise UserError(f"{name} is the class {given.__name__}; {_EXPECTED}: call the class, {given.__name__}()")
    if callable(given):
        return FunctionReward(given)
    found = f"{name} is {reprlib.repr(given)} ({type(given).__name__}); {_EXPECTED}"
    if isinstance(given, str):
        found += f'. For a function by its name: FunctionReward("{given}")'
    elif isinstance(given, list | tuple | dict):
        found += ". For several at once: WeightedSum([...])"
    raise UserError(found)


def check_rewards(guide: Any, held_out: Sequence[Any]) -> tuple[Reward, list[Reward]]:
    """Returns the guide and the held-out rewards; UserError if the first cannot guide, or two have one name."""
    if not isinstance(held_out, list | tuple):
        raise UserError(f"eval_rewards must be a list of rewards, got {reprlib.repr(held_out)}: give it in brackets")
    reward, others = as_reward(guide), [as_reward(each, f"eval_rewards[{k}]") for k, each in enumerate(held_out)]
    if reward.groupwise and reward.differentiable:
        raise UserError(f"{reward.name} is groupwise, so an image has no gradient of its own: differentiable = False")
    if not reward.higher_is_better:
        raise UserError(f"{reward.name} cannot guide: lower is better; give it a negative weight in WeightedSum")
    names = [each.name for each in (reward, *others)]
    if len(set(names)) < len(names):
        help = "remove the duplicate, give one a label if it takes one, or give a function another name"
        raise UserError(f"rewards need distinct names, got {', '.join(names)}; {help}")
    return reward, others
