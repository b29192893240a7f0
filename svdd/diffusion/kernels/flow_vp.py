"""Flow models in the coordinates and at the levels of a chain that preserves the variance.

Source: Kim et al., Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, 2025,
arXiv 2503.19385. A change of coordinates alone does not change the law of a step; its levels do.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from svdd.diffusion.kernels.base import widen
from svdd.diffusion.kernels.euler import EulerAncestral
from svdd.diffusion.kernels.flow import FlowKernel
from svdd.diffusion.kernels.lcm import LCM
from svdd.diffusion.kernels.vp import DDIM, DDPM, BetaKernel

__all__ = ["FlowDDIM", "FlowDDPM", "FlowEulerAncestral", "FlowLCM"]

# Stable Diffusion's betas, rescaled so that the first level is pure noise, as the start of a flow is
_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


class FlowDDIM(FlowKernel):
    """DDIM on a flow model: x = (alpha + sigma) x_flow, and the network is told s = sigma / (alpha + sigma).

    The shift of the saved scheduler has no effect.
    """

    chain: ClassVar[type[BetaKernel]] = DDIM

    def _set_timesteps(self, count: int, options: dict[str, Any]) -> None:
        self._chain = self.chain(_CONFIG, count, self.transition)
        self.levels = [*self._chain.levels[:-1], (1.0, 0.0)]
        shares = [sigma / (alpha + sigma) for alpha, sigma in self.levels[:-1]]
        self.timesteps = torch.tensor(shares) * self.config.num_train_timesteps

    def initial(self, noise: Tensor) -> Tensor:
        """Scales standard normal noise to x at i = 0, which the network sees as pure noise."""
        return noise * sum(self.levels[0])

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Divides by alpha + sigma."""
        return x / sum(self.levels[i])

    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the posterior mean and the predicted noise."""
        alpha, sigma = self.levels[i]
        flow = widen(x) / (alpha + sigma)
        return flow - sigma / (alpha + sigma) * output, flow + alpha / (alpha + sigma) * output

    def rho(self, i: int) -> float:
        """Returns the correlation of the noises before and after step i."""
        return self._chain.rho(i)


class FlowDDPM(FlowDDIM):
    """DDPM on a flow model."""

    chain = DDPM


class FlowEulerAncestral(FlowDDIM):
    """Euler ancestral on a flow model, in the coordinates x = x0 + sigma noise."""

    chain = EulerAncestral


class FlowLCM(FlowDDIM):
    """The timesteps and the fresh noise of LCM on a flow model, without LCM's boundary condition."""

    chain = LCM
