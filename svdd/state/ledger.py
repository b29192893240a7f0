"""The work of a batch, so that methods can be compared at equal compute."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """Counts and seconds of the work that a sampler caused.

    Args:
        denoiser_rows: Latents whose denoised prediction was computed; a classifier-free pair counts as one.
        network_rows: Rows that went through the network; a classifier-free pair counts as two.
        gradient_rows: Denoiser rows with a backward pass, which costs about two forward passes.
        decoded_images: Latents that were decoded.
        reward_calls: Images that the guide reward scored.
        denoiser_seconds: Wall time in the network.
        decoder_seconds: Wall time in the decoder, and in a learned value that decodes.
        reward_seconds: Wall time in the guide reward.
        total_seconds: Wall time of the sampler, all of the above included.
    """

    denoiser_rows: int = 0
    network_rows: int = 0
    gradient_rows: int = 0
    decoded_images: int = 0
    reward_calls: int = 0
    denoiser_seconds: float = 0.0
    decoder_seconds: float = 0.0
    reward_seconds: float = 0.0
    total_seconds: float = 0.0

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
        shares = {}
        for name, value in asdict(self).items():
            whole = isinstance(value, int) and value % images == 0
            shares[name] = value // images if whole else round(value / images, 6)
        return shares


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
