"""The reward of the posterior mean: v_i(x_i) = r(E[x_0 given x_i]).

Source: Li et al., 2024, arXiv 2408.08252, SVDD-PM; the same estimate as in DPS (Chung et al., 2022, arXiv 2209.14687).
"""

from torch import Tensor

from svdd.state import State
from svdd.values.base import Value

__all__ = ["PosteriorMean"]


class PosteriorMean(Value):
    """The reward of the decoded posterior mean: v(x) = r(decode(E[x_0 given x])).

    Needs no training. Costs one denoiser row per evaluated row, which the state keeps for the next step.
    """

    @property
    def differentiable(self) -> bool:
        """Whether the reward is."""
        return self.reward.differentiable

    def describe(self) -> str:
        """Names the reward: it is what may lack a gradient."""
        return f"reward {self.reward.name}"

    def forward(self, state: State) -> Tensor:
        """Returns the reward of each row's decoded x0, float32 [n]."""
        return state.scores(self.reward)
