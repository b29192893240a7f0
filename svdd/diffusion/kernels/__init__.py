"""Schedulers as Gaussian kernels: one file per kind of coordinates."""

from svdd.diffusion.kernels.base import Kernel
from svdd.diffusion.kernels.euler import Euler, EulerAncestral
from svdd.diffusion.kernels.flow import FlowEuler
from svdd.diffusion.kernels.flow_vp import FlowDDIM, FlowDDPM, FlowEulerAncestral, FlowLCM
from svdd.diffusion.kernels.lcm import LCM
from svdd.diffusion.kernels.vp import DDIM, DDPM

__all__ = ["DIFFUSION_KERNELS", "FLOW_KERNELS"]

# The first of each table is the default.
DIFFUSION_KERNELS: dict[str, type[Kernel]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "lcm": LCM,
}
FLOW_KERNELS: dict[str, type[Kernel]] = {
    "euler": FlowEuler,
    "ddim": FlowDDIM,
    "ddpm": FlowDDPM,
    "euler_ancestral": FlowEulerAncestral,
    "lcm": FlowLCM,
}
