"""The reverse step of a scheduler as a Gaussian kernel N(mean, std^2 I).

Schedulers return samples, not means. These classes repeat their arithmetic in the same order, so a draw from the kernel
equals `scheduler.step` bit for bit in float32, wherever that is finite. Multistep solvers (PNDM, UniPC, ...) are not
Markov and have no kernel.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from svdd import did_you_mean
from svdd.diffusion.base import Denoised

__all__ = [
    "KERNELS",
    "DDIMKernel",
    "DDPMKernel",
    "EulerAncestralKernel",
    "Kernel",
    "chain_settings",
    "find_kernel",
    "make_kernel",
]

_SPACINGS = ("leading", "trailing", "linspace")


class Kernel(ABC):
    """The T steps of one scheduler; ValueError if its configuration has no Gaussian kernel.

    Args:
        config: A diffusers scheduler configuration, of any scheduler of the same training noise.
        num_inference_steps: T.
        eta: Fraction of the DDPM noise that each step adds; only DDIM uses it.
    """

    scheduler_class: ClassVar[Any]
    allowed: ClassVar[dict[str, tuple[str, ...]]]  # values of the configuration that the kernel implements

    def __init__(self, config: Mapping[str, Any], num_inference_steps: int, eta: float) -> None:
        given = {name: value for name, value in config.items() if value is not None}  # null means the default
        try:
            self.scheduler = self.scheduler_class.from_config(given)
        except NotImplementedError as error:
            kind = self.scheduler_class.__name__
            raise ValueError(f"{kind} does not know beta_schedule={given['beta_schedule']!r}") from error
        self.config, self.eta = self.scheduler.config, eta
        if self.config.get("thresholding"):
            raise ValueError(
                "thresholding=true is for pixels, not for latents; set it to false in the scheduler's config"
            )
        for name, known in {"timestep_spacing": _SPACINGS, **self.allowed}.items():
            if self.config[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {self.config[name]!r}")
        self.timesteps = self._timesteps(num_inference_steps)
        self._require_finite()

    def _timesteps(self, count: int) -> Tensor:
        """Returns the training timestep of each step; ValueError if there are not so many."""
        trained = self.config.num_train_timesteps
        if count <= trained:
            self.scheduler.set_timesteps(count)
            if self.scheduler.timesteps[0] < trained:
                return self.scheduler.timesteps[:count]  # trailing spacing may add one more, at timestep -1
        raise ValueError(
            f"num_inference_steps={count} is too large for a model that was trained on {trained} timesteps; use at "
            f"most {trained - self.config.steps_offset}"
        )

    def _require_finite(self) -> None:
        """Raises ValueError if a step divides by zero."""
        one = torch.ones(1, 1, 1, 1)
        for i, t in enumerate(self.timesteps.tolist()):
            found = *self.predict(one, one / 2, i), self.flow(one, one / 2, i), torch.tensor(self.std(i))
            if not all(tensor.isfinite().all() for tensor in found):
                raise ValueError(
                    f"prediction_type={self.config.prediction_type} divides by zero at timestep {t:g}, where there is "
                    "no signal or no noise; a model that was trained with rescale_betas_zero_snr=true predicts v: set "
                    "prediction_type=v_prediction in the scheduler's config"
                )

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
        return float(self._std(i))

    @abstractmethod
    def _std(self, i: int) -> Tensor | float: ...

    @abstractmethod
    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Moves x from step i to i + 1 without noise (eta = 0)."""


class _AlphaKernel(Kernel):
    """A kernel in DDPM's coordinates x = sqrt(a) x_0 + sqrt(1 - a) noise; a' is the next step's a."""

    allowed: ClassVar = {"prediction_type": ("epsilon", "v_prediction", "sample")}

    @abstractmethod
    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns a and a'."""

    def _split(self, x: Tensor, output: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the predicted x_0 and the predicted noise."""
        beta, kind = 1 - alpha, self.config.prediction_type
        if kind == "epsilon":
            x0, epsilon = (x - beta**0.5 * output) / alpha**0.5, output
        elif kind == "v_prediction":
            x0, epsilon = alpha**0.5 * x - beta**0.5 * output, alpha**0.5 * output + beta**0.5 * x
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
        t, table = int(self.timesteps[i]), self.scheduler.alphas_cumprod
        previous = t - self.config.num_train_timesteps // self.scheduler.num_inference_steps
        return table[t], table[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = sqrt(a') x0 + sqrt(1 - a' - std^2) epsilon."""
        alpha, alpha_next = self._alphas(i)
        x0, epsilon = self._split(x, output, alpha)
        return Denoised(x0, alpha_next**0.5 * x0 + _root(1 - alpha_next - self._std(i) ** 2) * epsilon)

    def _std(self, i: int) -> Tensor:
        alpha, alpha_next = self._alphas(i)
        return self.eta * (((1 - alpha_next) / (1 - alpha)) * (1 - alpha / alpha_next)) ** 0.5


class DDPMKernel(_AlphaKernel):
    """Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239, formulas (6) and (7)."""

    scheduler_class = DDPMScheduler
    allowed: ClassVar = _AlphaKernel.allowed | {"variance_type": ("fixed_small", "fixed_large")}

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        return alphas[i], alphas[i + 1] if i + 1 < len(alphas) else self.scheduler.one

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = that of q(x_next | x, x0) at the predicted x0."""
        alpha, alpha_next = self._alphas(i)
        x0, _ = self._split(x, output, alpha)
        step_alpha = alpha / alpha_next
        weight_x0 = (alpha_next**0.5 * (1 - step_alpha)) / (1 - alpha)
        weight_x = step_alpha**0.5 * (1 - alpha_next) / (1 - alpha)
        return Denoised(x0, weight_x0 * x0 + weight_x * x)

    def _std(self, i: int) -> float:
        alpha, alpha_next = self._alphas(i)
        variance = 1 - alpha / alpha_next
        if self.config.variance_type == "fixed_small":
            variance = (1 - alpha_next) / (1 - alpha) * variance
        std = float(variance**0.5)
        return std if std > 1e-8 and int(self.timesteps[i]) else 0.0  # the scheduler clamps zero to 1e-10


class EulerAncestralKernel(Kernel):
    """Ancestral sampling with Euler steps (k-diffusion) in the coordinates x = x_0 + sigma noise."""

    scheduler_class = EulerAncestralDiscreteScheduler
    allowed: ClassVar = {"prediction_type": ("epsilon", "v_prediction")}

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Divides by sqrt(sigma^2 + 1)."""
        return x / ((self._sigmas(i)[0] ** 2 + 1) ** 0.5)

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = x + (sigma_down - sigma) (x - x0) / sigma, where sigma_down^2 = sigma'^2 - std^2."""
        sigma, sigma_next = self._sigmas(i)
        wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.config.prediction_type == "epsilon":
            x0 = wide - sigma * output
        else:
            x0 = output * (-sigma / (sigma**2 + 1) ** 0.5) + (wide / (sigma**2 + 1))
        down = _root(sigma_next**2 - self._std(i) ** 2)
        return Denoised(x0.to(x.dtype), (wide + (wide - x0) / sigma * (down - sigma)).to(x.dtype))

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Returns x0 + (sigma' / sigma) (x - x0)."""
        sigma, sigma_next = self._sigmas(i)
        ratio = sigma_next / sigma
        return (x0 + ratio * (x - x0)).to(x.dtype)

    def _sigmas(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns sigma and sigma', which is 0 at the end."""
        sigmas = self.scheduler.sigmas
        return sigmas[i], sigmas[i + 1 if i + 1 < len(self.timesteps) else -1]

    def _std(self, i: int) -> Tensor:
        sigma, sigma_next = self._sigmas(i)
        return (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5


def _root(variance: Tensor) -> Tensor:
    """Returns the square root of a variance, which rounding may have made negative."""
    return variance.clamp(min=0) ** 0.5


KERNELS: dict[str, type[Kernel]] = {"ddim": DDIMKernel, "ddpm": DDPMKernel, "euler_ancestral": EulerAncestralKernel}


def chain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved scheduler's configuration with what holds for latents, whatever class of scheduler saved it.

    As `StableDiffusionPipeline` does for its own scheduler, sets `clip_sample` to false and `steps_offset` to 1. The
    other class of kernel would have other defaults. `set_alpha_to_one` is false unless the saved class has it.
    ValueError if that class has no betas.
    """
    if "beta_schedule" not in config:
        kind = config.get("_class_name", "scheduler")
        raise ValueError(f"the model's {kind} has no beta_schedule, so it is no chain of DDPM's kind, as needed here")
    fixed = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": bool(config.get("set_alpha_to_one"))}
    defaults = [name for name in config.get("_use_default_values", []) if name not in fixed]
    return {**config, **fixed, "_use_default_values": defaults}


def find_kernel(name: str, known: Mapping[str, type[Kernel]] = KERNELS) -> type[Kernel]:
    """Returns the kernel class of a scheduler; raises ValueError if there is none."""
    if name in known:
        return known[name]
    raise ValueError(
        f"scheduler {name!r} has no Gaussian one-step kernel here (multistep solvers are not Markov); known: "
        f"{', '.join(known)}{did_you_mean(name, known)}"
    )


def make_kernel(name: str, config: Mapping[str, Any], num_inference_steps: int, eta: float) -> Kernel:
    """Builds one of `KERNELS` from the configuration that a model was saved with; raises ValueError if it cannot."""
    return find_kernel(name)(config, num_inference_steps, eta)
