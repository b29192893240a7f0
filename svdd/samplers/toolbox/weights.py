"""Feynman-Kac weights of a population of particles.

Particle k of an image has the weight w = prod_j G_j, with one potential G_j per weighed state. Potentials of every kind
multiply to exp(r / alpha) over a whole chain, so that the weighted ends follow p(x) exp(r(x) / alpha), and the mean of
w is an unbiased estimate of Z = E[exp(r / alpha)].

Sources: Chopin and Papaspiliopoulos, An Introduction to Sequential Monte Carlo, 2020, chapters 5 and 10; Singhal et
al., A General Framework for Inference-time Scaling and Steering of Diffusion Models, 2025, arXiv 2501.06848
(FK-steering: the four potentials).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdd.samplers.toolbox.resampling import RESAMPLERS
from svdd.samplers.toolbox.selection import draw, effective_sample_size, top
from svdd.samplers.toolbox.tempering import SCHEDULES, next_exponent

__all__ = ["POTENTIALS", "Weighing", "Weights"]

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Weights:
    """Log-weights of each image's particles, and the history that their potentials depend on.

    Every field is float64 of shape [images, particles], except `exponent`.

    Args:
        log_w: Accumulated log-weights; after resampling, an image's particles share the mean weight, so that the mean
            of exp(log_w) always estimates Z.
        log_potentials: Sum of the log-potentials along each particle's path, unchanged by resampling.
        peak: Largest tempered value along that path.
        total: Sum of the tempered values along it.
        exponent: Current tempering exponent, [images, 1].
    """

    log_w: Tensor
    log_potentials: Tensor
    peak: Tensor
    total: Tensor
    exponent: Tensor

    @staticmethod
    def equal(images: int, particles: int, device: torch.device) -> "Weights":
        """Returns equal weights, before any potential."""
        zero = torch.zeros(images, particles, dtype=torch.float64, device=device)
        return Weights(zero, zero, torch.full_like(zero, -math.inf), zero, zero[:, :1])

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate of log Z, [images]: the logarithm of the mean weight."""
        return self.log_w.logsumexp(1) - math.log(self.log_w.shape[1])

    def correct(self, log_ratio: Tensor) -> "Weights":
        """Multiplies by a ratio of densities that corrects for another proposal; it is no potential."""
        return replace(self, log_w=self.log_w + log_ratio)

    def multiply(self, increment: Tensor, tempered: Tensor) -> "Weights":
        """Multiplies by potentials, given their logarithms and the tempered values, and extends the history."""
        return replace(
            self,
            log_w=self.log_w + increment,
            log_potentials=self.log_potentials + increment,
            peak=self.peak.maximum(tempered),
            total=self.total + tempered,
        )

    def select(self, index: Tensor, resampled: Tensor) -> "Weights":
        """Keeps some particles; images that resampled, bool [images, 1], share their mean weight."""
        log_w = torch.where(resampled, self.log_normaliser[:, None], self.log_w.gather(1, index))
        history = {name: getattr(self, name).gather(1, index) for name in ("log_potentials", "peak", "total")}
        return replace(self, log_w=log_w, **history)


Potential = Callable[[Weights, Tensor], Tensor]

POTENTIALS: dict[str, Potential] = {  # (weights, tempered values lambda v / alpha) -> log G
    "difference": lambda weights, tempered: tempered - weights.log_potentials,  # telescopes
    "max": lambda weights, tempered: weights.peak.maximum(tempered),
    "sum": lambda weights, tempered: weights.total + tempered,
    "immediate": lambda weights, tempered: tempered,
}


@dataclass(frozen=True)
class Weighing:
    """How a particle sampler weighs, resamples and returns: settings that SMC and TwistedSMC share.

    Args:
        alpha: Temperature in units of the reward, above 0.
        potential: A key of `POTENTIALS`.
        resampler: A key of `svdd.samplers.toolbox.resampling.RESAMPLERS`.
        ess_threshold: Images resample when their effective sample size is at most this share of their particles.
        tempering: A key of `svdd.samplers.toolbox.tempering.SCHEDULES`, or `adaptive`.
        returns: `best` by reward, one `drawn` by weight, or `all`.

    Raises:
        ValueError: If a setting is unknown, out of range, or does not go with another.
    """

    alpha: float
    potential: str
    resampler: str
    ess_threshold: float
    tempering: str
    returns: str = "best"

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}; for the limit of alpha = 0 use SVDD")
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold must lie in 0 .. 1 (never .. at every step), got {self.ess_threshold}")
        for name, known in (
            ("potential", list(POTENTIALS)),
            ("resampler", list(RESAMPLERS)),
            ("tempering", [*SCHEDULES, "adaptive"]),
            ("returns", ["best", "drawn", "all"]),
        ):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if self.tempering == "adaptive" and self.potential != "difference":
            raise ValueError(f"adaptive tempering goes with potential 'difference' only, got {self.potential!r}")
        if self.tempering == "adaptive" and not 0 < self.ess_threshold < 1:
            raise ValueError(
                "adaptive tempering holds the effective sample size at ess_threshold, which must lie between 0 and 1, "
                f"got {self.ess_threshold}"
            )

    def weigh(self, weights: Weights, values: Tensor, progress: float) -> Weights:
        """Multiplies by the potentials of values [images, particles] at progress = i / T.

        At progress 1 they complete the product to exp(r / alpha).
        """
        scaled = values.double() / self.alpha
        if progress == 1:
            complete = weights.multiply(scaled - weights.log_potentials, scaled)
            return replace(complete, exponent=torch.ones_like(weights.exponent))
        exponent = self._exponent(weights, scaled, progress)
        tempered = exponent * scaled
        increment = POTENTIALS[self.potential](weights, tempered)
        return replace(weights.multiply(increment, tempered), exponent=exponent)

    def resample(self, weights: Weights, uniforms: Tensor) -> tuple[Tensor, Weights]:
        """Resamples the images whose effective sample size is low, with uniforms [images, particles] in [0, 1).

        Returns:
            Index of the kept particles, int64 [images, particles], and their weights.
        """
        images, particles = weights.log_w.shape
        # Adaptive tempering stops at the threshold itself, up to rounding; that counts as low.
        poor = (effective_sample_size(weights.log_w) <= self.ess_threshold * particles * (1 + _ROUNDING))[:, None]
        index = torch.arange(particles, device=poor.device).expand(images, -1)
        if poor.any():
            index = torch.where(poor, RESAMPLERS[self.resampler](weights.log_w, uniforms), index)
        return index, weights.select(index, poor)

    def ends(self, weights: Weights, rewards: Tensor, uniforms: Callable[[int], Tensor]) -> Tensor:
        """Returns the index of the particles to return, int64 [images, 1 or particles]; rewards [images, particles]."""
        if self.returns == "best":
            return top(rewards)
        if self.returns == "drawn":
            return draw(weights.log_w, uniforms(1))
        return torch.arange(rewards.shape[1], device=rewards.device).expand(len(rewards), -1)

    def _exponent(self, weights: Weights, scaled: Tensor, progress: float) -> Tensor:
        if self.tempering != "adaptive":
            return torch.full_like(weights.exponent, SCHEDULES[self.tempering](progress))
        return next_exponent(
            weights.log_w,
            lambda exponent: exponent * scaled - weights.log_potentials,
            weights.exponent,
            max(self.ess_threshold, 1 / scaled.shape[1]),
        )
