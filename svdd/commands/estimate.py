"""What a run will cost, from one rehearsed batch: rows, time, memory and disk. Nothing is written."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch.plugins import Precision

from svdd.commands.rehearsal import rehearsed
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.json_lines import encode
from svdd.runs.prediction import Prediction
from svdd.runs.prompts import Prompt, PromptDataset
from svdd.runs.rows import result_row
from svdd.runs.writer import encoded
from svdd.samplers.base import Sampler
from svdd.state.start import Start

__all__ = ["Estimate", "estimate"]

_WORK = ("denoiser_rows", "network_rows", "gradient_rows", "decoded_images", "reward_calls")
_PICTURES, _PICTURES_SECONDS = 4, 60.0  # drawn plainly for the size of a file, and how long that may take


@dataclass(frozen=True)
class Estimate:
    """What the images of all prompts cost; `share_left` of it is still to be drawn.

    Attributes:
        prompts: Prompts of the run.
        prompts_left: Those to be drawn.
        batch_prompts: Prompts of the measured batch.
        images: Images of all prompts.
        per_image: Counts of the work for one image, by their names in the ledger.
        seconds: Time of drawing and writing all images on one device; the model is loaded once more.
        parts: The shares of the parts of the model in that time; the rest is everything else.
        peak_bytes: CUDA: the most memory that the batch and the weights take together. CPU: how far the resident size
            grew from that of the loaded model. None if it cannot be measured.
        disk_bytes: Size of all pictures, rows and traces.
    """

    prompts: int
    prompts_left: int
    batch_prompts: int
    images: int
    per_image: dict[str, float]
    seconds: float
    parts: dict[str, float]
    peak_bytes: int | None
    disk_bytes: int

    @property
    def share_left(self) -> float:
        """The share of the prompts that is left."""
        return self.prompts_left / self.prompts

    @property
    def denoiser_rows(self) -> float:
        """Denoiser rows of all images."""
        return self.images * self.per_image["denoiser_rows"]

    def hours(self, devices: int = 1, left: bool = True) -> float:
        """Returns the hours for what is left, or for all, where each device draws an equal share of the prompts."""
        prompts = self.prompts_left if left else self.prompts
        return self.seconds / self.prompts * -(-prompts // devices) / 3600


def estimate(
    model: GuidedDiffusion,
    prompts: PromptDataset | Sequence[Prompt],
    batch_size: int,
    prompts_left: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Measures the first batch as `Rehearsal` describes, with its rows, mode, precision and device.

    The model stays on the device. A smaller last batch is assumed to take its share of a whole one.

    Args:
        model: The module of the run.
        prompts: All prompts of the run.
        batch_size: Prompts of a batch.
        prompts_left: Prompts that this device, or all of them, have left to draw; by default all.
        device: Where to draw.
        precision: The Trainer's plugin for its precision; None for what the weights have.
        clock: Returns seconds.
    """
    left, device = len(prompts) if prompts_left is None else prompts_left, torch.device(device)
    batch = list(islice(prompts, min(batch_size, left or len(prompts))))
    model.configure_model()
    (precision.convert_module(model) if precision is not None else model).to(device).eval()
    with nullcontext() if precision is None else precision.forward_context(), rehearsed(model.diffusion, clock) as known:
        memory = _Memory(device)
        begin = clock()
        with torch.inference_mode(not model.sampler.needs_gradient), torch.no_grad():
            prediction = model.predict(batch)
        files = [len(png) for _, png in encoded(prediction)]
        seconds = clock() - begin - known.overhead
        peak = memory.peak()
    with nullcontext() if precision is None else precision.forward_context():
        files = _picture_sizes(model, batch, clock) or files
    images = len(prediction.rows) // len(batch)  # per prompt
    lines = sum(len(encode(entry)) + 1 for entry in (*prediction.rows, *prediction.traces))
    file_names = len('"file": "images/000000-00.png", "sha256": "", ') + 64
    size = images * (sum(files) / len(files) + file_names) + lines / len(batch)
    return Estimate(
        prompts=len(prompts),
        prompts_left=left,
        batch_prompts=len(batch),
        images=len(prompts) * images,
        per_image=_work(model, prediction),
        seconds=seconds / len(batch) * len(prompts),
        parts={part: spent / seconds for part, spent in known.seconds.items()},
        peak_bytes=peak,
        disk_bytes=round(size * len(prompts)),
    )


def _work(model: GuidedDiffusion, prediction: Prediction) -> dict[str, float]:
    """Returns the counts of an image: those of the rehearsal, in which backward passes are left out, or counted ones."""
    found, cost = prediction.rows[0]["ledger"], model.cost
    if cost is None or not cost.gradient_rows:
        return {name: found[name] for name in _WORK}
    whole = model.diffusion.network_rows(model.diffusion.guidance_scale)
    return {**{name: getattr(cost, name) for name in _WORK}, "network_rows": cost.network_rows * whole}


def _picture_sizes(model: GuidedDiffusion, batch: list[Prompt], clock: Callable[[], float]) -> list[int]:
    """Returns the sizes of some pictures that are really drawn, without guidance; none if that takes too long."""
    begin, steps = clock(), model.diffusion.num_inference_steps

    def step(i: int, value: float | None) -> None:
        if i == 1 and (clock() - begin) * steps > _PICTURES_SECONDS:
            raise _TooLong

    count = model.images_per_prompt
    jobs = [(prompt, seed) for prompt in batch for seed in prompt.image_seeds(model.seed, count)][:_PICTURES]
    with torch.inference_mode(), suppress(_TooLong):
        start = Start(model.diffusion, [prompt.text for prompt, _ in jobs], [seed for _, seed in jobs])
        start.context.on_step = step
        images = Sampler.finish(start()).images.cpu()
        rows = [result_row(prompt, 0, 1, seed, {model.reward.name: 0.1234567}, {}) for prompt, seed in jobs]
        return [len(png) for _, png in encoded(Prediction(images, rows))]
    return []


class _TooLong(Exception):
    """Pictures take too long to draw."""


class _Memory:
    """The most memory that is taken from now on, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            with suppress(OSError):  # Linux: makes the present resident size the peak
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _peak_resident()

    def peak(self) -> int | None:
        """Returns the peak on CUDA, how far the resident size has grown on a CPU, and None elsewhere."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_resident() - self._before if self._device.type == "cpu" else None


def _peak_resident() -> int:
    """Returns the largest resident size of this process since it was last reset, in bytes."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
