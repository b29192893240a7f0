"""Steps of flow models, in the coordinates x = (1 - s) x0 + s noise of rectified flow (arXiv 2209.03003)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from svdd.diffusion.base import Denoised
from svdd.diffusion.kernels.base import Kernel, Network, widen

__all__ = ["FlowEuler", "FlowKernel"]


class FlowKernel(Kernel):
    """A chain of a flow model, whose network predicts v = noise - x0: x0 is x - s v, and the noise x + (1 - s) v."""

    scheduler_class: ClassVar[Any] = FlowMatchEulerDiscreteScheduler
    allowed: ClassVar = {"invert_sigmas": (False,)}

    @staticmethod
    def settings(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a saved scheduler's configuration; ValueError if it is not for flow models.

        A multistep solver with `use_flow_sigmas` states the shift as `flow_shift`.
        """
        if "shift" in config and "beta_schedule" not in config:  # a scheduler made in Python states no class
            return dict(config)
        if config.get("use_flow_sigmas"):
            trained = config.get("num_train_timesteps", 1000)
            return {"num_train_timesteps": trained, "shift": config.get("flow_shift", 1.0)}
        kind = config.get("_class_name", "scheduler")
        raise ValueError(f"the model's {kind} is not for flow matching, as needed here")

    def denoise(self, statistic: Tensor, ratio: float, network: Network) -> Tensor:
        """Returns the posterior mean of x0 given `statistic`, x0 + noise / ratio."""
        sigma = 1 / (1 + ratio)
        x = (1 - sigma) * statistic
        return (widen(x) - sigma * network(x, torch.tensor(sigma * self.config.num_train_timesteps))).to(x.dtype)


class FlowEuler(FlowKernel):
    """Flow matching; with eta = 0 the ODE of `FlowMatchEulerDiscreteScheduler`, with fresh noise its stochastic steps.

    Whether the saved scheduler has `stochastic_sampling` has no effect.
    """

    @classmethod
    def configure(cls, saved: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings; ValueError if an option has no effect, as a shift or the limits of a dynamic one."""
        settings = super().configure(saved, options)
        dynamic = bool(settings.get("use_dynamic_shifting"))
        idle = {"shift"} if dynamic else {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
        if vain := sorted(idle & options.keys()):
            state = f"use_dynamic_shifting is {'true' if dynamic else 'false'}"
            raise ValueError(f"scheduler_options: no effect of {', '.join(vain)} while {state}; set that as well")
        return settings

    def _set_timesteps(self, count: int, options: dict[str, Any]) -> None:
        if "sigmas" in options and len(options["sigmas"]) != count:
            raise ValueError(f"num_inference_steps={count} needs as many sigmas, got {len(options['sigmas'])}")
        if self.config.use_dynamic_shifting and options.get("mu") is None:
            raise ValueError("a scheduler with use_dynamic_shifting=true needs mu among the timestep options")
        with np.errstate(divide="ignore", invalid="ignore"):
            self.scheduler.set_timesteps(count, **options)
        if not self.scheduler.sigmas.isfinite().all():
            raise ValueError(f"num_inference_steps={count} is too small for this scheduler: its levels are not finite")
        if not (self.scheduler.sigmas.min() >= 0 and self.scheduler.sigmas.max() < 1.001):
            raise ValueError("the scheduler's noise levels leave 0 .. 1: check its shift, which is above 0")
        self.timesteps, self._sigmas = self.scheduler.timesteps, self.scheduler.sigmas
        self.levels = [(1 - sigma, sigma) for sigma in self._sigmas.tolist()]

    def initial(self, noise: Tensor) -> Tensor:
        """Returns the noise."""
        return noise

    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the posterior mean and the predicted noise."""
        wide, sigma = widen(x), self._sigmas[i]
        return wide - sigma * output, wide + (1.0 - sigma) * output

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Mean = (1 - s') x0 + rho s' noise: without noise x + (s' - s) v, as the scheduler computes it."""
        sigma, following = self._sigmas[i], self._sigmas[i + 1]
        x0 = self.split(x, output, i)[0]
        if self.std(i) == 0:
            mean = widen(x) + (following - sigma) * output
        elif self.rho(i) == 0:
            mean = (1.0 - following) * x0
        else:
            return super().predict(x, output, i)
        return Denoised(x0.to(x.dtype), mean.to(output.dtype))
