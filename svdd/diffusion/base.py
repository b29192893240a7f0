"""A pretrained text-to-image model as a Markov chain with Gaussian steps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdd import UserError, is_integer
from svdd.assets.content import digest
from svdd.diffusion.chunking import Chunker, Reproducible
from svdd.diffusion.memory import PeakMemory
from svdd.diffusion.preview import Preview

__all__ = ["Denoised", "Diffusion", "per_row"]


class Denoised(NamedTuple):
    """The result of one denoiser evaluation."""

    x0: Tensor  # posterior mean E[x_0 | x_i], [n, *latent_shape]
    mean: Tensor  # mean of the reverse kernel p(x_{i+1} | x_i), [n, *latent_shape]


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Reshapes one number per row, [n], so that it broadcasts against latents x, [n, ...], of any shape."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


class Diffusion(nn.Module, ABC):
    """The reverse chain of a pretrained model, from noise (step i = 0) to the latent of an image (i = T).

    The index i counts denoising steps, in the opposite direction to the paper's t. `x0` is always the clean latent.

    Args:
        num_inference_steps: T, the number of denoising steps.
        chunk_size: Rows that the network, the decoder or a reward processes at once, or `auto`.
        reproducible: Whether an image's bits are independent of other images, or `auto`: see `LatentDiffusion`.

    Attributes:
        inner_steps: Network evaluations of a step with noise; above 1 `draw` takes the place of the Gaussian kernel.
        from_files: Names of attributes, beyond weights and tokenizers, that were read from the model's files.
    """

    latent_shape: tuple[int, ...]  # of one latent, often (c, h, w); set by the subclass
    guidance_scale: float | None = None  # weight of classifier-free guidance; None if the family has none
    inner_steps: int = 1
    guides_above: float = 1.0  # guidance needs the unconditional half at scales above this one
    prompt_features_size: int = 0  # width of `prompt_features`; 0 if there are none
    from_files: tuple[str, ...] = ()
    anchor: Tensor

    def __init__(
        self, num_inference_steps: int, chunk_size: int | str = "auto", reproducible: Reproducible = "auto"
    ) -> None:
        super().__init__()
        if not is_integer(num_inference_steps) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps!r}")
        self.num_inference_steps, self.chunker = num_inference_steps, Chunker(chunk_size, reproducible)
        # A buffer follows the module to its device and precision.
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float32), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of latents."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """The device of latents."""
        return self.anchor.device

    def peak_memory(self) -> PeakMemory:
        """Begins to measure the memory that is taken on the device of latents."""
        return PeakMemory(self.device)

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise; otherwise all candidates of a parent are the same."""
        return any(self.std(i) > 0 for i in range(self.num_inference_steps))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a value learned on this chain depends on, as numbers and strings."""
        own = {"diffusion": type(self).__name__, "num_inference_steps": self.num_inference_steps}
        return own | {"latent_shape": list(self.latent_shape)}

    def fingerprints(self) -> dict[str, str]:
        """Returns digests of what images depend on beyond the settings, by the name of the submodule."""
        own = {"configuration": digest(self, deep=False)}
        return own | {name: digest(part) for name, part in self.named_children()}

    @classmethod
    def examine(cls, arguments: Mapping[str, Any]) -> None:
        """Raises UserError if small files show that a model cannot be built from these constructor arguments.

        Commands call it before they write anything or start processes; by default it checks nothing.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Any:
        """Returns the conditioning of distinct pairs of prompt and negative prompt (None: the model's default)."""

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Turns standard normal noise [n, *latent_shape] into x at i = 0."""

    @abstractmethod
    def denoise(self, x: Tensor, i: int, conditioning: Any, row: Tensor) -> Denoised:
        """Evaluates the network on x, [n, *latent_shape], at step i < T; `row`, int64 [n], indexes the prompts."""

    @abstractmethod
    def std(self, i: int) -> float:
        """Returns the standard deviation of the reverse kernel from step i to i + 1; 0 for a deterministic step."""

    def draw(self, x: Tensor, x0: Tensor, noise: Tensor, i: int, conditioning: Any, row: Tensor) -> Tensor:
        """Turns standard normal noise into x at step i + 1, given x and x0 at step i, all [n, *latent_shape].

        Evaluates the network `inner_steps` - 1 times; called if that is above 0, and in steps with noise.
        """
        raise UserError(f"{type(self).__name__} has inner_steps={self.inner_steps} and no `draw`: implement it")

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Turns latents [n, *latent_shape] into images, float32 [n, 3, H, W] in [0, 1]."""

    def network_rows(self, guidance_scale: float | None, i: int | None = None) -> int:
        """Returns the network evaluations per denoiser row: 2 if the scale needs the unconditional half.

        Without a step i, the answer is for the steps that take most.
        """
        return 2 if guidance_scale is not None and guidance_scale > self.guides_above else 1

    def prompt_features(self, conditioning: Any) -> Tensor | None:
        """Returns one vector per prompt of the conditioning, for learned values, [p, d], or None."""
        return None

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Moves latents x at step i, with posterior means x0, to step i + 1 without noise (DDIM with eta = 0)."""
        raise UserError(f"{type(self).__name__} has no deterministic step, which Lookahead needs: implement `flow`")

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Turns latents of images and standard normal noise, [n, *latent_shape] each, into x at step i < T."""
        raise UserError(f"{type(self).__name__} cannot noise an image, which Refinement needs: implement `renoise`")

    def check_preview(self, preview: Preview) -> None:
        """Raises UserError if the model cannot compute previews of this kind."""
        if preview.changes:
            settings = "guidance_scale, reuse_guidance and feature_depth"
            raise UserError(f"{type(self).__name__} computes no cheaper previews; leave out {settings} of the value")

    def has_preview(self, preview: Preview, i: int) -> bool:
        """Whether a preview at step i differs from the model's own prediction."""
        return False

    def preview_rows(self, preview: Preview, i: int) -> float:
        """Returns the network-row equivalents of one preview at step i; see `network_rows`."""
        return self.network_rows(self.guidance_scale, i)

    def record(self, x: Tensor, i: int, conditioning: Any, row: Tensor, preview: Preview) -> dict[str, Tensor]:
        """Evaluates as `denoise` and returns `x0`, `mean` and what previews of the children reuse, one row in each."""
        return self.denoise(x, i, conditioning, row)._asdict()

    def preview(
        self, x: Tensor, i: int, conditioning: Any, row: Tensor, preview: Preview, recorded: Mapping[str, Tensor]
    ) -> Tensor:
        """Returns a cheaper prediction of x0, [n, *latent_shape]; arguments as in `denoise`.

        `recorded` holds what `record` returned at the parent of each row, without `x0` and `mean`.
        """
        raise UserError(f"{type(self).__name__} has no cheaper prediction of x0")

    def load_decoder(self, name: str) -> nn.Module:
        """Returns another decoder, for previews: `tiny` for the small one of this model, a folder, or a hub name."""
        raise UserError(f"{type(self).__name__} has no other decoder than its own, got decoder={name!r}")
