"""What a run will cost, from one rehearsed batch: rows, time, memory and disk. Nothing is written."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from lightning.pytorch.plugins import Precision

from svdd.commands.progress import duration
from svdd.commands.rehearsal import rehearsed
from svdd.diffusion.memory import PeakMemory, in_units
from svdd.evaluation.rendering import render
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.encoding import encoded, pixels_of
from svdd.runs.json_lines import encode
from svdd.runs.prediction import Prediction
from svdd.runs.prompts import Prompt, PromptDataset
from svdd.runs.rows import result_row
from svdd.samplers.base import Sampler
from svdd.state.start import Start

__all__ = ["Estimate", "describe", "describe_peak", "estimate"]

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
        loaded_bytes: Memory before the batch, see `PeakMemory`; None if it is unknown.
        peak_bytes: The most during the batch.
        disk_bytes: Size of all pictures, rows and traces.
    """

    prompts: int
    prompts_left: int
    batch_prompts: int
    images: int
    per_image: dict[str, float]
    seconds: float
    parts: dict[str, float]
    loaded_bytes: int | None
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
    batch = [prompts[k] for k in range(min(batch_size, left or len(prompts)))]
    model.configure_model()
    (precision.convert_module(model) if precision is not None else model).to(device).eval()
    with nullcontext() if precision is None else precision.forward_context(), rehearsed(model, clock) as known:
        memory = PeakMemory(device)
        begin = clock()
        with torch.inference_mode(not model.sampler.needs_gradient), torch.no_grad():
            prediction = model.predict(batch)
        files = [len(png) for _, png in encoded(pixels_of(prediction), prediction.rows)]
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
        per_image={name: prediction.rows[0]["ledger"][name] for name in _WORK},
        seconds=seconds / len(batch) * len(prompts),
        parts={part: spent / seconds for part, spent in known.seconds.items()},
        loaded_bytes=memory.before,
        peak_bytes=peak,
        disk_bytes=round(size * len(prompts)),
    )


def describe(found: Estimate, devices: int, device: torch.device) -> list[str]:
    """Returns an estimate in lines for a terminal."""
    rows = [
        [name.replace("_", " "), f"{number:,.6g}", f"{number * found.images:,.0f}"]
        for name, number in found.per_image.items()
        if number
    ]
    table = render(["", "an image", "all images"], [["images", "", f"{found.images:,}"], *rows], "text")
    parts = ", ".join(f"{part} {share:.0%}" for part, share in found.parts.items() if share >= 0.005)
    each = f" on each of {devices} devices" if devices > 1 else ""
    times = [f"{_time(found.hours(devices, left=False))}{each} for all {found.prompts:,} prompts"]
    if found.prompts_left < found.prompts:
        done = found.prompts - found.prompts_left
        times.append(f"{_time(found.hours(devices))} for the {found.prompts_left:,} that are left ({done:,} are done)")
    prompts = "1 prompt" if found.batch_prompts == 1 else f"{found.batch_prompts} prompts"
    memory = "not known on this device"
    if found.peak_bytes is not None and found.loaded_bytes is not None:
        grown = found.peak_bytes - found.loaded_bytes
        memory = f"{describe_peak(found.peak_bytes, device)}, {in_units(grown)} above the loaded model"
    return [
        *table.splitlines(),
        f"time: {'; '.join(times)}; {found.seconds / found.images:.3g} s an image",
        f"measured: a batch of {prompts} on {device}, in which each kind of work was computed a few times ({parts})",
        f"memory: {memory}",
        f"disk: {in_units(found.disk_bytes)}",
        "not included: loading the model, and what --evaluation measures afterwards; nothing was written",
    ]


def describe_peak(peak: int, device: torch.device) -> str:
    """Returns a peak of `PeakMemory` in words."""
    return f"{in_units(peak)} {'of the process' if device.type == 'cpu' else 'allocated'} at most"


def _time(hours: float) -> str:
    return f"{duration(3600 * hours)} ({hours:.2g} hours)"


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
        return [len(png) for _, png in encoded(pixels_of(Prediction(images, rows)), rows)]
    return []


class _TooLong(Exception):
    """Pictures take too long to draw."""
