"""The work of a batch, so that methods can be compared at equal compute."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Counts of the work that a sampler caused, and its wall time in seconds."""

    denoiser_rows: int = 0  # latents whose denoised prediction was computed; a classifier-free pair counts as one
    # Rows that went through the network: a classifier-free pair counts as two, a preview that reuses features as the
    # share of a row that it computes.
    network_rows: float = 0
    gradient_rows: int = 0  # denoiser rows with a backward pass, which costs about two forward passes
    decoded_images: int = 0
    reward_calls: int = 0  # images that the guide reward scored
    denoiser_seconds: float = 0.0
    decoder_seconds: float = 0.0  # in the decoder, and in a learned value that decodes
    reward_seconds: float = 0.0
    total_seconds: float = 0.0  # in the sampler, all of the above included

    @contextmanager
    def timed(self, field: str, device: torch.device) -> Iterator[None]:
        """Adds the wall time of the block to `field`, synchronising a CUDA device at both ends."""
        start = _now(device)
        try:
            yield
        finally:
            setattr(self, field, getattr(self, field) + _now(device) - start)

    def per_image(self, images: int) -> dict[str, float]:
        """Returns each entry's share of one of `images` images; counts that divide evenly stay integers."""
        return {
            name: value // images if isinstance(value, int) and value % images == 0 else round(value / images, 6)
            for name, value in asdict(self).items()
        }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
