"""How much of a step is noise, for every scheduler by the same rules."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from svdd import is_integer, is_number

__all__ = ["Noise", "Transition"]

Noise = Literal["posterior", "cps", "fresh"]


@dataclass(frozen=True)
class Transition:
    """The law of a step between two levels x = alpha x0 + sigma noise.

    The noises of both levels have the correlation rho: given x0 and the noise epsilon of x, the next x' is drawn from
    N(alpha' x0 + rho sigma' epsilon, sigma'^2 (1 - rho^2)). The marginal law of x' is the same for every rho, if x0 is
    drawn from the posterior; the kernels take its mean.

    Args:
        noise: Rule for rho. `posterior`: the standard deviation is eta times that of DDPM's posterior (DDIM, arXiv
            2010.02502). `cps`: rho = cos(eta pi / 2) (Wang and Yu, Coefficients-Preserving Sampling, 2025, arXiv
            2509.05952). `fresh`: rho = 0, so that x' is new noise on x0.
        eta: Share of noise, 0 (deterministic) to 1.
        rho: The correlation itself, 0 to 1, in place of a rule.
        inner_steps: Network evaluations of a step; above 1 every step is a GLASS transition, the last one too.

    Raises:
        ValueError: If an argument is out of range or has no effect beside another.
    """

    noise: Noise = "posterior"
    eta: float = 1.0
    rho: float | None = None
    inner_steps: int = 1

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {self.noise!r}")
        if not is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in 0 .. 1, got {self.eta!r}")
        if self.rho is not None and (not is_number(self.rho) or not 0 <= self.rho <= 1):
            raise ValueError(f"rho must lie in 0 .. 1, got {self.rho!r}")
        if not is_integer(self.inner_steps) or self.inner_steps < 1:
            raise ValueError(f"inner_steps must be an integer >= 1, got {self.inner_steps!r}")
        if self.rho is not None and (self.noise, self.eta) != ("posterior", 1):
            raise ValueError(
                f"rho={self.rho} replaces the rule; leave out noise and eta, got noise={self.noise}, eta={self.eta}"
            )
        if self.noise == "fresh" and self.eta != 1:
            raise ValueError(f"noise=fresh does not depend on eta: leave eta at 1, got {self.eta}")
        if self.inner_steps > 1 and (self.rho == 1 or self.eta == 0):
            raise ValueError(f"inner_steps={self.inner_steps} needs steps with noise: set eta above 0, or rho below 1")

    @property
    def posterior(self) -> bool:
        """Whether the rule is that of DDIM and DDPM, which most schedulers follow."""
        return self.noise == "posterior" and self.rho is None

    def correlation(self, level: tuple[float, float], following: tuple[float, float]) -> float:
        """Returns rho of a step between two levels (alpha, sigma)."""
        (alpha, sigma), (alpha_next, sigma_next) = level, following
        if self.rho is not None:
            return float(self.rho)
        if self.noise == "cps":
            return math.cos(self.eta * math.pi / 2)
        if self.noise == "fresh":
            return 0.0
        ratio = alpha * sigma_next / (alpha_next * sigma) if sigma > 0 else 1.0
        return math.sqrt(min(max(1 - self.eta**2 * (1 - ratio**2), 0.0), 1.0))
