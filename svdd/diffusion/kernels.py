"""The reverse step of a scheduler as a Gaussian kernel N(mean, std^2 I).

Schedulers return samples, not means. These classes repeat their arithmetic in the same order, so a draw from the kernel
equals `scheduler.step` bit for bit in float32. Only one-step solvers have such a kernel: a multistep solver (PNDM,
DPM-Solver++ 2M, UniPC, ...) is not Markov in x.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from svdd import did_you_mean
from svdd.diffusion.base import Denoised

__all__ = ["KERNELS", "DDIMKernel", "DDPMKernel", "EulerAncestralKernel", "Kernel", "find_kernel", "make_kernel"]

_NEGLIGIBLE_STD = 1e-8


class Kernel(ABC):
    """The T steps of one scheduler.

    Args:
        config: A diffusers scheduler configuration, of any scheduler of the same training noise.
        num_inference_steps: T.
        eta: Fraction of the DDPM noise that each step adds; only DDIM uses it.

    Raises:
        ValueError: If the configuration has no Gaussian kernel.
    """

    scheduler_class: ClassVar[Any]
    allowed: ClassVar[dict[str, tuple[str, ...]]]  # values of the configuration that the kernel implements

    def __init__(self, config: dict[str, Any], num_inference_steps: int, eta: float) -> None:
        self.scheduler = self.scheduler_class.from_config(config)
        self.config = self.scheduler.config
        if self.config.get("thresholding"):
            raise ValueError("a scheduler with thresholding=true has no Gaussian kernel; set it to false in its config")
        for name, known in self.allowed.items():
            if self.config[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {self.config[name]!r}")
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps: Tensor = self.scheduler.timesteps
        self.eta = eta
        self.stds = [self._std(i) for i in range(len(self.timesteps))]

    def initial(self, noise: Tensor) -> Tensor:
        """Scales standard normal noise to x at i = 0."""
        return noise * self.scheduler.init_noise_sigma

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Scales latents at step i for the network."""
        return x

    @abstractmethod
    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Turns the network's output at step i into the posterior mean and the kernel's mean."""

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        return self.stds[i]

    @abstractmethod
    def _std(self, i: int) -> float: ...

    @abstractmethod
    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Moves x from step i to i + 1 without noise (eta = 0)."""


class _AlphaKernel(Kernel):
    """A kernel in the variance-preserving coordinates of DDPM: x_t = sqrt(a) x_0 + sqrt(1 - a) noise."""

    allowed: ClassVar = {"prediction_type": ("epsilon", "v_prediction", "sample")}

    @abstractmethod
    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns the cumulative signal variance a before and after step i."""

    def _split(self, x: Tensor, output: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the predicted x_0 and the predicted noise."""
        beta = 1 - alpha
        kind = self.config.prediction_type
        if kind == "epsilon":
            x0, epsilon = (x - beta**0.5 * output) / alpha**0.5, output
        elif kind == "v_prediction":
            x0 = alpha**0.5 * x - beta**0.5 * output
            epsilon = alpha**0.5 * output + beta**0.5 * x
        else:  # "sample"
            x0, epsilon = output, (x - alpha**0.5 * output) / beta**0.5
        if self.config.get("clip_sample"):
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0, epsilon

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Returns sqrt(a') x0 + sqrt(1 - a') epsilon with epsilon = (x - sqrt(a) x0) / sqrt(1 - a)."""
        alpha, alpha_next = self._alphas(i)
        epsilon = (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5
        return alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * epsilon


class DDIMKernel(_AlphaKernel):
    """Song et al., Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502, formula (12); any eta."""

    scheduler_class = DDIMScheduler

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        t = int(self.timesteps[i])
        previous = t - self.config.num_train_timesteps // self.scheduler.num_inference_steps
        table = self.scheduler.alphas_cumprod
        return table[t], table[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = sqrt(a') x0 + sqrt(1 - a' - std^2) epsilon."""
        alpha, alpha_next = self._alphas(i)
        x0, epsilon = self._split(x, output, alpha)
        std = self.eta * self._variance(i) ** 0.5
        direction = (1 - alpha_next - std**2) ** 0.5 * epsilon
        return Denoised(x0, alpha_next**0.5 * x0 + direction)

    def _std(self, i: int) -> float:
        return float(self.eta * self._variance(i) ** 0.5)

    def _variance(self, i: int) -> Tensor:
        alpha, alpha_next = self._alphas(i)
        return ((1 - alpha_next) / (1 - alpha)) * (1 - alpha / alpha_next)


class DDPMKernel(_AlphaKernel):
    """Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239, formulas (6) and (7)."""

    scheduler_class = DDPMScheduler
    allowed: ClassVar = _AlphaKernel.allowed | {"variance_type": ("fixed_small", "fixed_large")}

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        table = self.scheduler.alphas_cumprod
        last = i + 1 == len(self.timesteps)
        return table[int(self.timesteps[i])], self.scheduler.one if last else table[int(self.timesteps[i + 1])]

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """The posterior mean of q(x_next | x, x0) at the predicted x0."""
        alpha, alpha_next = self._alphas(i)
        x0, _ = self._split(x, output, alpha)
        step_alpha = alpha / alpha_next
        weight_x0 = (alpha_next**0.5 * (1 - step_alpha)) / (1 - alpha)
        weight_x = step_alpha**0.5 * (1 - alpha_next) / (1 - alpha)
        return Denoised(x0, weight_x0 * x0 + weight_x * x)

    def _std(self, i: int) -> float:
        if int(self.timesteps[i]) == 0:
            return 0.0
        alpha, alpha_next = self._alphas(i)
        variance = 1 - alpha / alpha_next
        if self.config.variance_type == "fixed_small":
            variance = (1 - alpha_next) / (1 - alpha) * variance
        std = float(variance**0.5)
        return std if std > _NEGLIGIBLE_STD else 0.0


class EulerAncestralKernel(Kernel):
    """Ancestral sampling with Euler steps in variance-exploding coordinates: x = x_0 + sigma noise (k-diffusion)."""

    scheduler_class = EulerAncestralDiscreteScheduler
    allowed: ClassVar = {"prediction_type": ("epsilon", "v_prediction")}

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Divides by sqrt(sigma^2 + 1)."""
        return x / ((self.scheduler.sigmas[i] ** 2 + 1) ** 0.5)

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = x + (sigma_down - sigma) (x - x0) / sigma."""
        sigma, kind = self.scheduler.sigmas[i], self.config.prediction_type
        wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        if kind == "epsilon":
            x0 = wide - sigma * output
        else:
            x0 = output * (-sigma / (sigma**2 + 1) ** 0.5) + (wide / (sigma**2 + 1))
        derivative = (wide - x0) / sigma
        sigma_next, up = self.scheduler.sigmas[i + 1], self._up(i)
        down = (sigma_next**2 - up**2) ** 0.5
        return Denoised(x0.to(x.dtype), (wide + derivative * (down - sigma)).to(x.dtype))

    def _std(self, i: int) -> float:
        return float(self._up(i))

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Returns x0 + (sigma' / sigma) (x - x0)."""
        ratio = self.scheduler.sigmas[i + 1] / self.scheduler.sigmas[i]
        return (x0 + ratio * (x - x0)).to(x.dtype)

    def _up(self, i: int) -> Tensor:
        sigma, sigma_next = self.scheduler.sigmas[i], self.scheduler.sigmas[i + 1]
        return (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5


KERNELS: dict[str, type[Kernel]] = {"ddim": DDIMKernel, "ddpm": DDPMKernel, "euler_ancestral": EulerAncestralKernel}


def find_kernel(name: str, known: Mapping[str, type[Kernel]]) -> type[Kernel]:
    """Returns the kernel class of a scheduler; raises ValueError if there is none."""
    if name not in known:
        raise ValueError(
            f"scheduler {name!r} has no Gaussian one-step kernel here (multistep solvers are not Markov); known: "
            f"{', '.join(known)}{did_you_mean(name, known)}"
        )
    return known[name]


def make_kernel(name: str, config: dict[str, Any], num_inference_steps: int, eta: float) -> Kernel:
    """Builds one of `KERNELS` from the scheduler configuration that a model was saved with.

    Raises:
        ValueError: If the scheduler or the configuration has no Gaussian one-step kernel.
    """
    return find_kernel(name, KERNELS)(dict(config), num_inference_steps, eta)
