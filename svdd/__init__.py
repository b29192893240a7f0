"""Steer text-to-image diffusion models with any reward, at inference time, without training or gradients."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdd.diffusion.stable_diffusion import StableDiffusion
    from svdd.module import GuidedDiffusion

__all__ = ["GuidedDiffusion", "StableDiffusion", "__version__"]

try:
    __version__ = version("svdd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {"GuidedDiffusion": "svdd.module", "StableDiffusion": "svdd.diffusion.stable_diffusion"}


def __getattr__(name: str) -> Any:
    """Imports the two heavy names on first use, so that `import svdd` costs nothing."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'svdd' has no attribute {name!r}; it has {', '.join(__all__)}")
