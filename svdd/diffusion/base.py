"""A pretrained text-to-image model as a Markov chain with Gaussian steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.diffusion.chunking import Chunker

__all__ = ["Denoised", "Diffusion"]


class Denoised(NamedTuple):
    """What one denoiser evaluation tells about a latent.

    Args:
        x0: Posterior mean E[x_0 | x_i], [n, c, h, w].
        mean: Mean of the reverse kernel p(x_{i+1} | x_i), [n, c, h, w].
    """

    x0: Tensor
    mean: Tensor


class Diffusion(nn.Module, ABC):
    """The reverse chain of a pretrained model, from noise (step i = 0) to the latent of an image (i = T).

    The index i counts denoising steps: it runs the other way than the paper's t. `x0` is always the clean latent.
    A subclass implements encoding, denoising and decoding; `State.start` begins a chain.

    Args:
        num_inference_steps: T, the number of denoising steps.
        chunk_size: Rows that go through the network, the decoder or a reward at once, or `auto`.

    Raises:
        ValueError: If `num_inference_steps` is below 1.

    Attributes:
        guidance_scale: Weight of classifier-free guidance; None where the family has none.
    """

    guidance_scale: float | None = None

    def __init__(self, num_inference_steps: int, chunk_size: int | str = "auto") -> None:
        super().__init__()
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        self.chunker = Chunker(chunk_size)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, (c, h, w)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point type that latents have."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that latents live on."""

    @property
    def network_rows_per_row(self) -> int:
        """Network evaluations behind one denoiser row: 2 with classifier-free guidance."""
        return 1

    @property
    def identity(self) -> dict[str, Any]:
        """What a value that was learned on this chain depends on, as plain numbers and strings."""
        return {
            "diffusion": type(self).__name__,
            "num_inference_steps": self.num_inference_steps,
            "latent_shape": list(self.latent_shape),
        }

    @property
    def prompt_features_size(self) -> int:
        """Width of what `prompt_features` returns; 0 where it returns None."""
        return 0

    def prompt_features(self, conditioning: Any) -> Tensor | None:
        """Returns one vector for each encoded prompt, [p, d], for learned values; None if there are none.

        Args:
            conditioning: What `encode` returned.
        """
        return None

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Any:
        """Returns the conditioning of `len(prompts)` prompts; opaque to everyone but `denoise`.

        Args:
            prompts: Distinct (prompt, negative prompt) pairs, first half.
            negative_prompts: The second half; None means the model's own default.
        """

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Turns standard normal noise [n, c, h, w] into x at i = 0."""

    @abstractmethod
    def denoise(self, x: Tensor, i: int, conditioning: Any, row: Tensor) -> Denoised:
        """Evaluates the network.

        Args:
            x: Latents at step i, [n, c, h, w].
            i: Step index, 0 .. T - 1.
            conditioning: What `encode` returned.
            row: Index of each latent's prompt in the conditioning, int64 [n].
        """

    @abstractmethod
    def std(self, i: int) -> float:
        """Standard deviation of the reverse kernel from step i to i + 1; 0 where the step is deterministic."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Turns latents [n, c, h, w] into images, float32 [n, 3, H, W] in [0, 1]."""

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Moves latents from step i to i + 1 without noise, as if x0 were right (a DDIM step with eta = 0).

        Args:
            x: Latents at step i, [n, c, h, w].
            x0: Their posterior means.
            i: Step index, 0 .. T - 1.

        Raises:
            UserError: If the family does not say how.
        """
        raise UserError(f"{type(self).__name__} has no deterministic step, which Lookahead needs: implement `flow`")

    def preview(self, x: Tensor, i: int, conditioning: Any, row: Tensor, guidance_scale: float) -> Tensor:
        """Returns x0 under another weight of classifier-free guidance, [n, c, h, w]; arguments as in `denoise`.

        Raises:
            UserError: If the family has no such guidance.
        """
        raise UserError(f"{type(self).__name__} has no classifier-free guidance, so a preview cannot leave it out")

    def preview_network_rows(self, guidance_scale: float) -> int:
        """Network evaluations behind one preview: 2 where that scale needs the unconditional half."""
        return 2 if guidance_scale > 1 else 1

    def load_decoder(self, name: str) -> nn.Module:
        """Returns a decoder from latents [n, c, h, w] to images float32 [n, 3, H, W] in [0, 1], for previews.

        Args:
            name: `tiny` for the small one that fits this model, a folder, or a hub name.

        Raises:
            UserError: If there is none, or it does not fit.
        """
        raise UserError(f"{type(self).__name__} has no other decoder than its own, got decoder={name!r}")

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise; without it, candidates of one parent would all be the same."""
        return any(self.std(i) > 0 for i in range(self.num_inference_steps))
