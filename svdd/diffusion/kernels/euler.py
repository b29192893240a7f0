"""Euler steps in the coordinates x = x0 + sigma noise of Karras et al., 2022, arXiv 2206.00364."""

from typing import Any, ClassVar

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from svdd.diffusion.base import Denoised
from svdd.diffusion.kernels.base import Level, Network, widen
from svdd.diffusion.kernels.vp import BetaKernel, root

__all__ = ["Euler", "EulerAncestral"]


class Euler(BetaKernel):
    """Euler steps; with eta = 0 those of diffusers' `EulerDiscreteScheduler`, whose spacings of sigma are followed."""

    scheduler_class: ClassVar[Any] = EulerDiscreteScheduler
    allowed: ClassVar = BetaKernel.allowed | {
        "interpolation_type": ("linear", "log_linear"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def _levels(self) -> list[Level]:
        sigmas = self.scheduler.sigmas[: len(self.timesteps) + 1].clone()
        if len(self.scheduler.timesteps) > len(self.timesteps):
            sigmas[-1] = self.scheduler.sigmas[-1]  # where the surplus step of trailing spacing would have arrived
        self._sigmas = sigmas
        return [(1.0, float(sigma)) for sigma in sigmas]

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Divides by sqrt(sigma^2 + 1)."""
        return x / ((self._sigmas[i] ** 2 + 1) ** 0.5)

    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the posterior mean, and (x - x0) / sigma; in float32 or better."""
        return self._split(x, output, self._sigmas[i])

    def denoise(self, statistic: Tensor, ratio: float, network: Network) -> Tensor:
        """Returns the posterior mean of x0 given `statistic`, x0 + noise / ratio."""
        sigma, t = torch.tensor(1 / ratio), self.timestep(ratio)
        if self.config.get("timestep_type") == "continuous" and self.config.prediction_type == "v_prediction":
            t = 0.25 * sigma.log()
        output = network(statistic / ((sigma**2 + 1) ** 0.5), t)
        return self._split(statistic, output, sigma)[0].to(statistic.dtype)

    def _split(self, x: Tensor, output: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        wide = widen(x)
        if self.config.prediction_type == "epsilon":
            x0 = wide - sigma * output
        elif self.config.prediction_type == "v_prediction":
            x0 = output * (-sigma / (sigma**2 + 1) ** 0.5) + (wide / (sigma**2 + 1))
        else:  # "sample"
            x0 = output
        return x0, (wide - x0) / sigma

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = x + (sigma_down - sigma) (x - x0) / sigma, where sigma_down^2 = sigma'^2 - std^2."""
        x0, derivative = self.split(x, output, i)
        mean = widen(x) + derivative * (self._down(i) - self._sigmas[i])
        return Denoised(x0.to(x.dtype), mean.to(x.dtype))

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Returns x0 + (sigma' / sigma) (x - x0)."""
        ratio = self._sigmas[i + 1] / self._sigmas[i]
        return (x0 + ratio * (x - x0)).to(x.dtype)

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        return float(self._std(i)) if self.transition.posterior else super().std(i)

    def _std(self, i: int) -> Tensor:
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        return self.transition.eta * root(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)

    def _down(self, i: int) -> Tensor:
        sigma_next = self._sigmas[i + 1]
        if not self.transition.posterior:
            return self.rho(i) * sigma_next
        return root(sigma_next**2 - self._std(i) ** 2) if self.transition.eta > 0 else sigma_next


class EulerAncestral(Euler):
    """Ancestral sampling with Euler steps, as in k-diffusion; DDPM's law in other coordinates."""

    scheduler_class: ClassVar[Any] = EulerAncestralDiscreteScheduler
    allowed: ClassVar = BetaKernel.allowed | {"prediction_type": ("epsilon", "v_prediction")}
