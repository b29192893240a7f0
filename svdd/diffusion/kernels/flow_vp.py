"""Flow models in the coordinates and at the levels of a chain that preserves the variance.

Source: Kim et al., Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, 2025,
arXiv 2503.19385. A change of coordinates alone does not change the law of a step; its levels do.
"""

from collections.abc import Mapping
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
_OPTIONS = "options of the chain"


class FlowDDIM(FlowKernel):
    """DDIM on a flow model: x = (alpha + sigma) x_flow, and the network is told s = sigma / (alpha + sigma).

    The shift of the saved scheduler has no effect; options replace settings of the chain, such as its betas.
    """

    chain: ClassVar[type[BetaKernel]] = DDIM

    def __init__(self, config: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._options = config.get(_OPTIONS, {})
        super().__init__({name: value for name, value in config.items() if name != _OPTIONS}, *args, **kwargs)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError if an option is no setting of the chain, or is what the network predicts."""
        cls.chain.check_options(options)
        if "prediction_type" in options:
            raise ValueError("scheduler_options: a flow model predicts v alone; leave prediction_type out")

    @classmethod
    def configure(cls, saved: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of the flow and the options of the chain."""
        return {**cls.settings(saved), _OPTIONS: dict(options)}

    def _set_timesteps(self, count: int, options: dict[str, Any]) -> None:
        self._chain = self.chain({**_CONFIG, **self._options}, count, self.transition)
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
