"""Latent consistency models: each step predicts x0 and adds fresh noise.

Source: Luo et al., Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference, 2023, arXiv
2310.04378.
"""

from typing import Any, ClassVar

from diffusers import LCMScheduler
from torch import Tensor

from svdd.diffusion.kernels.vp import VPKernel

__all__ = ["LCM"]


class LCM(VPKernel):
    """`LCMScheduler`: mean sqrt(a') (c_out x0 + c_skip x) and standard deviation sqrt(1 - a'); the last step is exact.

    The steps are chosen among the `original_inference_steps` for which the model was distilled. LCM's own rule is fresh
    noise, whatever the default of other schedulers; `cps` or `rho` keep a share of the noise.
    """

    scheduler_class = LCMScheduler
    allowed: ClassVar = {"prediction_type": VPKernel.allowed["prediction_type"]}

    def _timesteps(self, count: int, options: dict[str, Any]) -> Tensor:
        if self.transition.posterior and self.transition.eta != 1:
            raise ValueError(f"lcm draws fresh noise: use noise=cps or rho for less, got eta={self.transition.eta}")
        if self.transition.inner_steps > 1:
            raise ValueError(
                f"lcm takes one network evaluation per step, got inner_steps={self.transition.inner_steps}"
            )
        most = options.get("original_inference_steps") or self.config.original_inference_steps
        if count > most:
            raise ValueError(
                f"num_inference_steps={count} is too large: lcm chooses its steps among the model's "
                f"original_inference_steps={most}"
            )
        self.scheduler.set_timesteps(count, **options)
        return self.scheduler.timesteps

    def _alphas(self, i: int) -> tuple[Tensor, Tensor]:
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        return alphas[i], alphas[i + 1] if i + 1 < len(alphas) else alphas.new_ones(())

    def rho(self, i: int) -> float:
        """Returns 0 but for the last step, unless the transition states another correlation."""
        return 0.0 if self.transition.posterior and i + 2 < len(self.levels) else super().rho(i)

    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the consistency function at x in place of the posterior mean, and the predicted noise."""
        x0, epsilon = super().split(x, output, i)
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(self.timesteps[i])
        return out * x0 + skip * x, epsilon
