"""The work of a batch, so that methods can be compared at equal compute."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Ledger"]

_CLOCKS = ("cuda", "xpu", "mps")  # devices whose events measure time without a wait
_Mark = Any  # a time in seconds, or an event


@dataclass
class Ledger:
    """Counts of the work that a sampler caused, and its wall time in seconds.

    On a CUDA, XPU or MPS device, times are measured by events on the device, for which nothing waits. The fields hold
    them once the block that is timed as `total_seconds` has ended. No two times but the total overlap.
    """

    denoiser_rows: int = 0  # latents whose denoised prediction was computed; a classifier-free pair counts as one
    # Rows that went through the network: a classifier-free pair counts as two, a preview that reuses features as the
    # share of a row that it computes.
    network_rows: float = 0
    gradient_rows: int = 0  # denoiser rows with a backward pass, which costs about two forward passes
    decoded_images: int = 0
    reward_calls: int = 0  # images that the guide reward scored
    denoiser_seconds: float = 0.0
    decoder_seconds: float = 0.0  # in the decoder, and in a learned value that decodes
    reward_seconds: float = 0.0  # that the run waited for the reward; one in threads also works while others do
    total_seconds: float = 0.0  # in the sampler, all of the above included

    def __post_init__(self) -> None:
        self._open: list[tuple[str, _Mark, _Mark]] = []  # no field: blocks whose events have not been read

    @contextmanager
    def timed(self, field: str, device: torch.device) -> Iterator[None]:
        """Adds the time of the block to `field`; at the end of `total_seconds`, waits for the device once."""
        total = field == "total_seconds"
        start = time.perf_counter() if total else _mark(device)
        try:
            yield
        finally:
            if total and device.type in _CLOCKS:
                backend = getattr(torch, device.type)
                backend.synchronize(*([] if device.type == "mps" else [device]))
            end = time.perf_counter() if total else _mark(device)
            self._open.append((field, start, end))
            if isinstance(end, float):
                self._read()

    def _read(self) -> None:
        blocks, self._open = self._open, []
        for field, start, end in blocks:
            if isinstance(end, float):
                spent = end - start
            else:
                end.synchronize()
                spent = start.elapsed_time(end) / 1000
            setattr(self, field, getattr(self, field) + spent)

    def entered(self) -> dict[str, Any]:
        """Returns what is entered so far, for `restore`."""
        return {**vars(self), "_open": [*self._open]}

    def restore(self, entered: dict[str, Any]) -> None:
        """Drops what was entered since then."""
        vars(self).update(entered)

    def per_image(self, images: int) -> dict[str, float]:
        """Returns each entry's share of one of `images` images; counts that divide evenly stay integers."""
        self._read()
        return {
            name: value // images if isinstance(value, int) and value % images == 0 else round(value / images, 6)
            for name, value in asdict(self).items()
        }


def _mark(device: torch.device) -> _Mark:
    """Returns the present time, on an accelerator as an event in the order of its work."""
    if device.type not in _CLOCKS:
        return time.perf_counter()
    backend: Any = getattr(torch, device.type)
    event = backend.Event(enable_timing=True)
    event.record(*([] if device.type == "mps" else [backend.current_stream(device)]))
    return event
