"""A nearly free chain and reward, for tests of the run machinery."""

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from svdd.diffusion.base import Denoised, Diffusion
from svdd.rewards.base import Reward


class StubDiffusion(Diffusion):
    """Two steps towards the middle of the range, 4 x 4 pixels.

    Args:
        num_inference_steps: T, the number of denoising steps.
        chunk_size: Rows per call.
        most_rows: Calls with more rows raise an out-of-memory error.
    """

    latent_shape = property(lambda self: (3, 4, 4))
    dtype = property(lambda self: torch.float32)
    device = property(lambda self: torch.device("cpu"))

    def __init__(
        self, num_inference_steps: int = 2, chunk_size: int | str = "auto", most_rows: int | None = None
    ) -> None:
        super().__init__(num_inference_steps, chunk_size, reproducible=True)
        self.most_rows = most_rows

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def denoise(self, x: Tensor, i: int, conditioning: Tensor, row: Tensor) -> Denoised:
        if self.most_rows is not None and len(x) > self.most_rows:
            raise torch.OutOfMemoryError
        x0 = x / 2 + 0.001 * conditioning[row].view(-1, 1, 1, 1)
        return Denoised(x0, x0)

    def std(self, i: int) -> float:
        return 0.3 if i < self.num_inference_steps - 1 else 0.0

    def decode(self, x0: Tensor) -> Tensor:
        return x0.sigmoid()


_ERRORS = {
    "RuntimeError": lambda word: RuntimeError(f"no score for {word}"),
    "SystemExit": lambda word: SystemExit(0),
    "MemoryError": lambda word: MemoryError(),
    "allocator": lambda word: RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 9 bytes."),
}


class StubReward(Reward):
    """Mean of all pixels.

    Args:
        gate: Scoring a prompt with the word "wait" creates `gate`.PID and blocks until the file `gate` exists.

    Scoring a prompt with the word "large" takes 256 MiB for a moment.
    Prompts that contain the word in the environment variable STUB_BAD raise the error that STUB_RAISES names.
    """

    def __init__(self, gate: str | None = None) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.gate and any("wait" in prompt for prompt in prompts):
            for thread in threading.enumerate():  # earlier batches are on disk
                if thread.name == "svdd-writer":
                    thread.join()
            Path(f"{self.gate}.{os.getpid()}").touch()
            end = time.monotonic() + 120
            if os.environ.get("STUB_BLOCKS"):
                ctypes.PyDLL(None).sleep(120)  # keeps the interpreter's lock
            while not os.path.exists(self.gate) and time.monotonic() < end:
                time.sleep(0.01)
        if any("large" in prompt for prompt in prompts):
            torch.ones(2**26)
        bad = os.environ.get("STUB_BAD")
        if bad and any(bad in prompt for prompt in prompts):
            raise _ERRORS[os.environ.get("STUB_RAISES", "RuntimeError")](bad)
        return images.mean((1, 2, 3))


class Wait(L.Callback):
    """Creates `gate`.waits in the second epoch and blocks there until the file `gate` exists."""

    def __init__(self, gate: str) -> None:
        self.gate = gate

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx == 0:
            Path(f"{self.gate}.waits").touch()
            end = time.monotonic() + 120
            while not os.path.exists(self.gate) and time.monotonic() < end:
                time.sleep(0.01)
