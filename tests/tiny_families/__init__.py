"""Small random pipelines with the component classes and scheduler configurations of the published models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["FAMILIES", "FLOW", "VP", "Family", "Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """A law of the steps, in our words and in diffusers'."""

    name: str
    ours: Mapping[str, Any]  # arguments of the family's class
    scheduler: str  # class of diffusers
    settings: Mapping[str, Any] = field(default_factory=dict)  # of that scheduler, beyond the saved ones
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's `__call__`


VP = (
    Step("DDIM, eta 0", {"scheduler": "ddim", "eta": 0.0}, "DDIMScheduler", call={"eta": 0.0}),
    Step("DDIM, eta 1", {"scheduler": "ddim", "eta": 1.0}, "DDIMScheduler", call={"eta": 1.0}),
    Step("Euler", {"scheduler": "euler", "eta": 0.0}, "EulerDiscreteScheduler"),
    Step("Euler ancestral", {"scheduler": "euler_ancestral"}, "EulerAncestralDiscreteScheduler"),
)
_FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW = (
    Step("ODE", {"scheduler": "euler", "eta": 0.0}, _FLOW),
    Step("stochastic sampling", {"scheduler": "euler", "noise": "fresh"}, _FLOW, {"stochastic_sampling": True}),
)


@dataclass(frozen=True, eq=False)
class Family:
    """A small pipeline, and what its own `__call__` is given where our class is given something else.

    Sizes are height and width in pixels. By default a size is left out, so that both sides take the model's own.
    """

    name: str
    kind: str  # our class
    module: str  # of this folder; its `save(folder, **options)` writes the pipeline
    steps: tuple[Step, ...] = VP
    options: Mapping[str, Any] = field(default_factory=dict)  # of `save`
    guidance: tuple[float, float] = (7.5, 1.0)  # a scale with classifier-free guidance, and one without
    keyword: str = "guidance_scale"  # name of that scale in `__call__`
    rows: int = 2  # network rows of a denoiser row with guidance; 1 if the scale is an input of the network
    negative: bool = True  # whether the pipeline takes negative prompts
    no_negative: str | None = None  # what it is given if there is none
    size: tuple[int, int] = (48, 80)  # another than the model's own
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the reference's scheduler, if it was saved as another
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments of `__call__`
    ours: Mapping[str, Any] = field(default_factory=dict)  # arguments of our class

    def save(self, folder: Path) -> str:
        return import_module(f"{__name__}.{self.module}").save(folder, **self.options)


FAMILIES = (
    Family("Stable Diffusion 1.5", "StableDiffusion", "stable_diffusion", options={"kind": "sd15"}),
    Family("Stable Diffusion 2.1", "StableDiffusion", "stable_diffusion", options={"kind": "sd21"}),
)
