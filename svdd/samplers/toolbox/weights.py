"""Feynman-Kac weights of a population of particles, and their tempering.

Particle k of an image has the weight w = prod_j G_j, with one potential G_j per weighed state. Potentials of every kind
multiply to exp(r / alpha) over a whole chain, so that the weighted ends follow p(x) exp(r(x) / alpha), and the mean of
w is an unbiased estimate of Z = E[exp(r / alpha)]. The targets on the way are p_i(x_i) exp(lambda_i v_i(x_i) / alpha):
early values are inaccurate, and a small exponent lambda_i limits their effect.

Sources: Chopin and Papaspiliopoulos, An Introduction to Sequential Monte Carlo, 2020, chapters 5 and 10; Singhal et
al., A General Framework for Inference-time Scaling and Steering of Diffusion Models, 2025, arXiv 2501.06848
(FK-steering: potentials); Kim, Kim and Park, 2025, arXiv 2501.05803 (DAS: exponential and adaptive tempering); Jasra et
al., Inference for Levy-Driven Stochastic Volatility Models via Adaptive Sequential Monte Carlo, 2011 (next exponent).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from svdd import require_numbers
from svdd.samplers.toolbox.selection import RESAMPLERS, draw, effective_sample_size, top
from svdd.samplers.toolbox.temperature import AUTO_START, Alpha, auto_alpha, require_alpha

__all__ = ["POTENTIALS", "SCHEDULES", "Ends", "Potential", "Resampler", "Tempering", "Weighing", "Weights", "adapt"]

Potential = Literal["difference", "max", "sum", "immediate"]
Resampler = Literal["multinomial", "stratified", "systematic", "residual", "ssp"]
Tempering = Literal["none", "linear", "exponential", "adaptive"]
Ends = Literal["best", "drawn", "all"]


class Weights(NamedTuple):
    """Log-weights of each image's particles and their history, float64 [images, particles]."""

    log_w: Tensor  # resampled particles share the mean weight, so that the mean always estimates Z
    log_potentials: Tensor  # sum along each particle's path, unchanged by resampling
    peak: Tensor  # largest tempered value along that path
    total: Tensor  # sum of the tempered values along it
    exponent: Tensor  # of the tempering, [images, 1]
    alpha: Tensor  # temperature, [images, 1]; infinity until `auto` has found one

    @staticmethod
    def equal(images: int, particles: int, device: torch.device) -> "Weights":
        """Returns equal weights, before any potential."""
        zero = torch.zeros(images, particles, dtype=torch.float64, device=device)
        infinite = torch.full_like(zero, math.inf)
        return Weights(zero, zero, -infinite, zero, zero[:, :1], infinite[:, :1])

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate of log Z, [images]: the logarithm of the mean weight."""
        return self.log_w.logsumexp(1) - math.log(self.log_w.shape[1])


POTENTIALS: dict[str, Callable[[Weights, Tensor], Tensor]] = {  # (weights, tempered values lambda v / alpha) -> log G
    "difference": lambda weights, tempered: tempered - weights.log_potentials,  # telescopes
    "max": lambda weights, tempered: weights.peak.maximum(tempered),
    "sum": lambda weights, tempered: weights.total + tempered,
    "immediate": lambda weights, tempered: tempered,
}

SCHEDULES: dict[str, Callable[[float], float]] = {  # i / T -> lambda
    "none": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "exponential": lambda progress: 2.0**progress - 1.0,  # (1 + gamma)^i - 1 with the gamma that makes it end at 1
}


@dataclass(frozen=True)
class Weighing:
    """How `SMC` and `TwistedSMC` weigh, resample and return; their arguments, checked with ValueError."""

    alpha: Alpha
    potential: Potential
    resampler: Resampler
    ess_threshold: float
    tempering: Tempering
    returns: Ends = "best"

    def __post_init__(self) -> None:
        require_alpha(self.alpha, zero=False)
        require_numbers(ess_threshold=self.ess_threshold)
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold must lie in 0 .. 1 (never .. at every step), got {self.ess_threshold}")
        for field in fields(self):
            known, given = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and given not in known:
                raise ValueError(f"{field.name} must be one of {', '.join(known)}, got {given!r}")
        if self.tempering == "adaptive" and self.potential != "difference":
            raise ValueError(f"adaptive tempering goes with potential 'difference' only, got {self.potential!r}")
        if self.tempering == "adaptive" and not 0 < self.ess_threshold < 1:
            raise ValueError(
                "adaptive tempering holds the effective sample size at ess_threshold, which must lie between 0 and 1, "
                f"got {self.ess_threshold}"
            )

    def weighs(self, progress: float) -> bool:
        """Whether a guided state at progress = i / T is weighed; with `auto`, not before a third of the chain."""
        return self.alpha != "auto" or progress >= AUTO_START

    def weigh(self, weights: Weights, values: Tensor, progress: float) -> Weights:
        """Multiplies by the potentials of values [images, particles] at progress = i / T; at 1 to exp(r / alpha)."""
        if self.alpha == "auto":
            alpha = torch.where(weights.alpha.isinf(), auto_alpha(values), weights.alpha)
        else:
            alpha = torch.full_like(weights.alpha, self.alpha)
        scaled, potential = values.double() / alpha, self.potential
        if progress == 1:
            exponent, potential = torch.ones_like(weights.exponent), "difference"
        elif self.tempering == "adaptive":
            n = scaled.shape[1]
            exponent = adapt(weights, scaled, max(self.ess_threshold, 1 / n) * n)
        else:
            exponent = torch.full_like(weights.exponent, SCHEDULES[self.tempering](progress))
        tempered, none = exponent * scaled, alpha.isinf()  # none: equal values, which leave no trace
        log_g = POTENTIALS[potential](weights, tempered)
        exponent = torch.where(none, weights.exponent, exponent)
        peak, total = torch.where(none, weights.peak, weights.peak.maximum(tempered)), weights.total + tempered
        return Weights(weights.log_w + log_g, weights.log_potentials + log_g, peak, total, exponent, alpha)

    def resample(self, weights: Weights, uniforms: Tensor) -> tuple[Tensor, Weights]:
        """Resamples images of low effective sample size; index and uniforms in [0, 1) are [images, particles]."""
        images, particles = weights.log_w.shape
        low = self.ess_threshold * particles * (1 + 1e-6)  # adaptive tempering stops at the threshold, up to rounding
        poor = (effective_sample_size(weights.log_w) <= low)[:, None]
        index = torch.arange(particles, device=poor.device).expand(images, -1)
        if poor.any():
            index = torch.where(poor, RESAMPLERS[self.resampler](weights.log_w, uniforms), index)
        log_w, log_potentials, peak, total = (field.gather(1, index) for field in weights[:4])
        log_w = torch.where(poor, weights.log_normaliser[:, None], log_w)
        return index, Weights(log_w, log_potentials, peak, total, weights.exponent, weights.alpha)

    def ends(self, weights: Weights, rewards: Tensor, uniforms: Callable[[int], Tensor]) -> Tensor:
        """Returns the index of the particles to return, int64 [images, 1 or particles]; rewards [images, particles]."""
        if self.returns == "best":
            return top(rewards)
        if self.returns == "drawn":
            return draw(weights.log_w, uniforms(1))
        return torch.arange(rewards.shape[1], device=rewards.device).expand(len(rewards), -1)


def adapt(weights: Weights, scaled: Tensor, size: float) -> Tensor:
    """Returns the largest next exponents, at most 1, that keep the effective sample size, by bisection; [images, 1].

    Args:
        weights: The weights so far; an exponent stays if the effective sample size is already lower.
        scaled: Values / alpha, float64 [images, particles].
        size: Effective sample size to keep with the potentials `difference`, 1 .. particles.
    """

    def enough(exponent: Tensor) -> Tensor:
        log_w = weights.log_w + POTENTIALS["difference"](weights, exponent * scaled)
        return effective_sample_size(log_w)[:, None] >= size

    low, one = weights.exponent, torch.ones_like(weights.exponent)
    high = one
    for _ in range(40):
        middle = (low + high) / 2
        holds = enough(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where(enough(one), one, low)
