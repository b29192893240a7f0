"""Families whose pipelines draw in the sizes that the model was trained on, and scale pictures to any other."""

from importlib import import_module
from typing import Any

from torch import Tensor

from svdd.diffusion.pipelines import to_images

__all__ = ["TrainedSizes"]


class TrainedSizes:
    """Part of a family that draws in the size of its training whose aspect ratio is nearest to the one asked for.

    Pictures are scaled and cropped to the size asked for, as in the pipeline. A model whose sizes the pipeline does not
    list has one size, and draws others directly.
    """

    pipe: Any
    vae: Any
    transformer: Any

    @property
    def size_multiple(self) -> int:
        """Pixels of which height and width are multiples: 1 where pictures are scaled to the size asked for."""
        return 1 if self._sizes else int(self.pipe.vae_scale_factor * self.transformer.config.patch_size)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of the latents of a picture; notes the size asked for."""
        self._asked = height, width
        if sizes := self._sizes:
            height, width = self.pipe.image_processor.classify_height_width_bin(height, width, ratios=sizes)
        factor = self.pipe.vae_scale_factor
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the autoencoder's decoder, and scales and crops the pictures to the size asked for."""
        images = self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        height, width = self._asked
        return to_images(self.pipe.image_processor.resize_and_crop_tensor(images, width, height))

    @property
    def _sizes(self) -> dict[str, list[float]] | None:
        """The sizes of the model's training by aspect ratio, or None if the pipeline does not list them."""
        pixels = self.transformer.config.sample_size * self.pipe.vae_scale_factor
        return getattr(import_module(type(self.pipe).__module__), f"ASPECT_RATIO_{pixels}_BIN", None)
