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


_LCM = Step("LCM", {"scheduler": "lcm"}, "LCMScheduler")
VP = (
    Step("DDIM eta 0", {"scheduler": "ddim", "eta": 0.0}, "DDIMScheduler", call={"eta": 0.0}),
    Step("DDIM eta 1", {"scheduler": "ddim", "eta": 1.0}, "DDIMScheduler", call={"eta": 1.0}),
    Step("Euler", {"scheduler": "euler", "eta": 0.0}, "EulerDiscreteScheduler"),
    _LCM,
    Step("Euler ancestral", {"scheduler": "euler_ancestral"}, "EulerAncestralDiscreteScheduler"),
)
_TRAILING = Step(  # as the distilled SDXL models need
    "Euler trailing",
    {"scheduler": "euler", "eta": 0.0, "scheduler_options": {"timestep_spacing": "trailing"}},
    "EulerDiscreteScheduler",
    {"timestep_spacing": "trailing"},
)
_UNSAID = {"clip_sample": False, "set_alpha_to_one": False}  # what a saved scheduler of another kind does not state
_PLAYGROUND_VAE = {"latents_mean": [-1.6, -1.0, 0.9, 0.1], "latents_std": [8.4, 5.9, 4.7, 6.0], "scaling_factor": 0.5}
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
    argument: str = "guidance_scale"  # its name in our class
    rows: int = 2  # network rows of a denoiser row with guidance; 1 if the scale is an input of the network
    negative: bool | str = True  # whether the pipeline takes negative prompts, `encoded` if as embeddings only
    no_negative: str | None = None  # what it is given if there is none
    size: tuple[int, int] = (48, 80)  # another than the model's own
    own_size: tuple[int, int] | None = None  # in place of the model's own, if that is large
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the scheduler, for one saved as another class
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments of `__call__`
    ours: Mapping[str, Any] = field(default_factory=dict)  # arguments of our class

    def save(self, folder: Path) -> str:
        return import_module(f"{__name__}.{self.module}").save(folder, **self.options)


_SMALL: dict[str, Any] = {"own_size": (64, 64)}
_FEW: dict[str, Any] = {"call": {"max_sequence_length": 64}, "ours": {"max_sequence_length": 64}}  # for speed
_NONE: dict[str, Any] = {"negative": False, **_SMALL}
_TRUE_CFG: dict[str, Any] = {"keyword": "true_cfg_scale", "argument": "true_cfg_scale", "no_negative": ""}
_SANA: dict[str, Any] = {"call": {"use_resolution_binning": False}, "settings": {"shift": 3.0}}  # saved for DPM-Solver
_SCHNELL, _DISTILLED = {"version": "schnell"}, {"version": "distilled"}

FAMILIES = (
    Family("Stable Diffusion 1.5", "StableDiffusion", "stable_diffusion", options={"kind": "sd15"}),
    Family("Stable Diffusion 2.1", "StableDiffusion", "stable_diffusion", options={"kind": "sd21"}),
    Family("LCM", "LatentConsistency", "latent_consistency", (_LCM,), {}, (8.5, 1.0), rows=1, **_NONE),
    Family("SDXL", "StableDiffusionXL", "sdxl", (*VP, _TRAILING), guidance=(5.0, 1.0)),
    Family(
        "SDXL, distilled guidance",
        "StableDiffusionXL",
        "sdxl",
        steps=VP[1:2],
        options={"guidance_embedding": 16, "zeros": False, "vae": _PLAYGROUND_VAE},
        rows=1,
    ),
    Family(
        "PixArt-Sigma",
        "PixArtSigma",
        "pixart_sigma",
        guidance=(4.5, 1.0),
        no_negative="",
        settings=_UNSAID,
        call={"use_resolution_binning": False},
    ),
    Family(
        "PixArt-Sigma, trained sizes",
        "PixArtSigma",
        "pixart_sigma",
        steps=VP[-1:],
        options={"sample_size": 32},
        guidance=(4.5, 1.0),
        no_negative="",
        size=(160, 250),
        settings=_UNSAID,
    ),
    Family("SD 3.5", "StableDiffusion3", "sd3", FLOW, {}, (7.0, 1.0)),
    Family("SD 3 without T5", "StableDiffusion3", "sd3", FLOW, {"version": "3", "t5": False}, (7.0, 1.0)),
    Family("FLUX.1 dev", "Flux", "flux", FLOW, {}, (3.5, 1.0), rows=1, **_NONE),
    Family("FLUX.1 dev with true CFG", "Flux", "flux", FLOW, {}, (2.0, 1.0), **_TRUE_CFG, **_SMALL, **_FEW),
    Family("FLUX.1 schnell", "Flux", "flux", FLOW, _SCHNELL, rows=1, **_NONE, **_FEW),
    Family(
        "FLUX.2 klein base", "Flux2Klein", "flux2_klein", FLOW, {}, (4.0, 1.0), negative="encoded", **_SMALL, **_FEW
    ),
    Family("FLUX.2 klein", "Flux2Klein", "flux2_klein", FLOW, _DISTILLED, rows=1, **_NONE, **_FEW),
    Family(
        *("Qwen-Image", "QwenImage", "qwen_image", FLOW, {}, (4.0, 1.0)),
        keyword="true_cfg_scale",
        no_negative="",
        **_SMALL,
    ),
    Family("Z-Image", "ZImage", "z_image", FLOW, {}, (5.0, 0.0), **_SMALL),
    Family("Sana", "Sana", "sana", FLOW, {}, (4.5, 1.0), no_negative="", size=(32, 96), **_SMALL, **_SANA),
)
