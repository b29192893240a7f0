"""DDIM and DDPM, in the coordinates x = sqrt(a) x0 + sqrt(1 - a) noise in which the variance is preserved."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from svdd.diffusion.base import Denoised
from svdd.diffusion.kernels.base import Kernel, Level, Network

__all__ = ["DDIM", "DDPM", "BetaKernel", "VPKernel", "root"]

SPACINGS = ("leading", "trailing", "linspace")


class BetaKernel(Kernel):
    """A scheduler whose noise is stated by betas, one for each training timestep."""

    allowed: ClassVar = {
        "timestep_spacing": SPACINGS,
        "prediction_type": ("epsilon", "v_prediction", "sample"),
    }

    @staticmethod
    def settings(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a saved scheduler's configuration with what holds for latents, whatever class of scheduler saved it.

        As `StableDiffusionPipeline` does for its own scheduler, sets `clip_sample` to false and `steps_offset` to 1.
        The other class of kernel would have other defaults. `set_alpha_to_one` is false unless the saved class has it.
        ValueError if that class has no betas.
        """
        if "beta_schedule" not in config:
            kind = config.get("_class_name", "scheduler")
            raise ValueError(f"the model's {kind} has no beta_schedule: it is no chain of DDPM's kind, as needed here")
        fixed = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": bool(config.get("set_alpha_to_one"))}
        defaults = [name for name in config.get("_use_default_values", []) if name not in fixed]
        return {**config, **fixed, "_use_default_values": defaults}

    def _set_timesteps(self, count: int, options: dict[str, Any]) -> None:
        if self.config.get("thresholding"):
            raise ValueError(
                "thresholding=true is for pixels, not for latents; set it to false in the scheduler's config"
            )
        self.timesteps = self._timesteps(count, options)
        self.levels = self._levels()
        self._require_finite()

    def _timesteps(self, count: int, options: dict[str, Any]) -> Tensor:
        """Returns the training timestep of each step; ValueError if there are not so many."""
        trained = self.config.num_train_timesteps
        if count <= trained:
            self.scheduler.set_timesteps(count, **options)
            if self.scheduler.timesteps[0] < trained:
                return self.scheduler.timesteps[:count]  # trailing spacing may add one more, at timestep -1
        raise ValueError(
            f"num_inference_steps={count} is too large for a model that was trained on {trained} timesteps; use at "
            f"most {trained - self.config.steps_offset}"
        )

    @abstractmethod
    def _levels(self) -> list[Level]: ...

    def _require_finite(self) -> None:
        """Raises ValueError if a step divides by zero."""
        one = torch.ones(1)
        for i, t in enumerate(self.timesteps.tolist()):
            found = *self.predict(one, one / 2, i), self.flow(one, one / 2, i), torch.tensor(self.std(i))
            if not all(tensor.isfinite().all() for tensor in found):
                raise ValueError(
                    f"prediction_type={self.config.prediction_type} divides by zero at timestep {t:g}, where there is "
                    "no signal or no noise; a model that was trained with rescale_betas_zero_snr=true predicts v: set "
                    "prediction_type=v_prediction in the scheduler's config"
                )

    def timestep(self, ratio: float) -> Tensor:
        """Returns the training timestep at which alpha / sigma = ratio, interpolated in sigma / (alpha + sigma)."""
        alphas = self.scheduler.alphas_cumprod.double().sqrt()
        shares = (1 - alphas**2).sqrt() / (alphas + (1 - alphas**2).sqrt())
        return torch.tensor(np.interp(1 / (1 + ratio), shares, np.arange(len(shares))), dtype=torch.float32)

    def initial(self, noise: Tensor) -> Tensor:
        """Scales standard normal noise to x at i = 0."""
        return noise * self.scheduler.init_noise_sigma


class VPKernel(BetaKernel):
    """A kernel in DDPM's coordinates x = sqrt(a) x_0 + sqrt(1 - a) noise; a' is the next step's a."""

    @abstractmethod
    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns a and a'."""

    def _levels(self) -> list[Level]:
        pairs = [self._alphas(i) for i in range(len(self.timesteps))]
        return [(float(a**0.5), float((1 - a) ** 0.5)) for a in (*(pair[0] for pair in pairs), pairs[-1][1])]

    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the predicted x_0 and the predicted noise."""
        return self._split(x, output, self._alphas(i)[0])

    def denoise(self, statistic: Tensor, ratio: float, network: Network) -> Tensor:
        """Returns the posterior mean of x0 given `statistic`, x0 + noise / ratio."""
        alpha = torch.tensor(ratio**2 / (1 + ratio**2))
        x = alpha**0.5 * statistic
        return self._split(x, network(x, self.timestep(ratio)), alpha)[0]

    def _split(self, x: Tensor, output: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
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


class DDIM(VPKernel):
    """Song et al., Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502, formula (12); any eta."""

    scheduler_class = DDIMScheduler

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        t, table = int(self.timesteps[i]), self.scheduler.alphas_cumprod
        previous = t - self.config.num_train_timesteps // self.scheduler.num_inference_steps
        return table[t], table[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = sqrt(a') x0 + sqrt(1 - a' - std^2) epsilon."""
        if not self.transition.posterior:
            return super().predict(x, output, i)
        alpha_next = self._alphas(i)[1]
        x0, epsilon = self.split(x, output, i)
        return Denoised(x0, alpha_next**0.5 * x0 + root(1 - alpha_next - self._std(i) ** 2) * epsilon)

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        return float(self._std(i)) if self.transition.posterior else super().std(i)

    def _std(self, i: int) -> Tensor:
        alpha, alpha_next = self._alphas(i)
        return self.transition.eta * (((1 - alpha_next) / (1 - alpha)) * (1 - alpha / alpha_next)) ** 0.5


class DDPM(VPKernel):
    """Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239, formulas (6) and (7).

    A saved `variance_type` is that of the posterior with eta = 1.
    """

    scheduler_class = DDPMScheduler
    allowed: ClassVar = VPKernel.allowed | {"variance_type": ("fixed_small", "fixed_large")}

    @property
    def _own(self) -> bool:
        return self.transition.posterior and self.transition.eta == 1

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        return alphas[i], alphas[i + 1] if i + 1 < len(alphas) else self.scheduler.one

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = that of q(x_next | x, x0) at the predicted x0."""
        if not self._own:
            return super().predict(x, output, i)
        alpha, alpha_next = self._alphas(i)
        x0, _ = self.split(x, output, i)
        step_alpha = alpha / alpha_next
        weight_x0 = (alpha_next**0.5 * (1 - step_alpha)) / (1 - alpha)
        weight_x = step_alpha**0.5 * (1 - alpha_next) / (1 - alpha)
        return Denoised(x0, weight_x0 * x0 + weight_x * x)

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        if not self._own:
            return super().std(i)
        alpha, alpha_next = self._alphas(i)
        variance = 1 - alpha / alpha_next
        if self.config.variance_type == "fixed_small":
            variance = (1 - alpha_next) / (1 - alpha) * variance
        std = float(variance**0.5)
        return std if std > 1e-8 and int(self.timesteps[i]) else 0.0  # the scheduler clamps zero to 1e-10


def root(variance: Tensor) -> Tensor:
    """Returns the square root of a variance, which rounding may have made negative."""
    return variance.clamp(min=0) ** 0.5
