"""What every value is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.rewards.base import Reward
from svdd.state.state import State

__all__ = ["Value"]


class Value(nn.Module, ABC):
    """Estimates the soft value v_i(x_i) = alpha log E[exp(r(x) / alpha) given x_i] of every row.

    A value is bound to the guide reward once, by whoever owns both, so that the reward exists once, and prepared for
    the diffusion that it will be asked about.

    Attributes:
        most_rows: The most denoiser rows that the evaluation of one row costs, and what its next step needs with it.
    """

    most_rows: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._bound: tuple[Reward, ...] = ()  # a tuple, so that the reward is not registered a second time

    def bind(self, reward: Reward) -> None:
        """Sets the reward whose value this is."""
        self._bound = (reward,)

    def prepare(self, diffusion: Diffusion) -> None:
        """Builds or loads what depends on the diffusion; called once, before any state is evaluated."""

    @property
    def reward(self) -> Reward:
        """The bound reward.

        Raises:
            UserError: If none was bound.
        """
        if not self._bound:
            raise UserError(f"{type(self).__name__} has no reward yet: call value.bind(reward) first")
        return self._bound[0]

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from the estimate to the latents."""
        return False

    def describe(self) -> str:
        """Names the value for an error message."""
        return f"value {type(self).__name__}"

    @abstractmethod
    def forward(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; at the end of the chain it must be the reward itself."""
