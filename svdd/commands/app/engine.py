"""Draws what a visitor wants, unguided and guided with the same random seeds, one job at a time."""

import gc
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdd import UserError
from svdd.assets.loaded import keeping_weights, next_run
from svdd.commands.app.template import Wanted
from svdd.commands.parser import Parser, as_user_errors
from svdd.diffusion.arithmetic import float32_default
from svdd.diffusion.base import Diffusion
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.runs.encoding import encoded, pixels_of
from svdd.runs.rows import Prompt, ResultRow
from svdd.samplers.base import Sampler
from svdd.samplers.budget import count, fit_budget
from svdd.samplers.unguided import Unguided
from svdd.state.recorder import Recorder
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean

__all__ = ["Drawn", "Engine", "Progress", "Stopped"]

_EVERY = 0.4  # seconds between two previews
_MAX_DECODED = 2**30  # bytes of decoded images at once
_PARTS = {"reward": Reward, "eval_rewards": list[Reward], "diffusion": Diffusion, "sampler": Sampler, "value": Value}


class Stopped(Exception):
    """The visitor has stopped the job."""


class Progress(NamedTuple):
    """Where a job is."""

    guided: bool
    step: int
    steps: int
    value: float | None  # mean value of the particles, if the sampler has evaluated them
    frames: list[Tensor | None]  # the x0 of each image so far, uint8 [h, w, 3]


class Drawn(NamedTuple):
    """Pictures of one sampler."""

    guided: bool
    files: list[bytes]  # PNG, byte for byte as a run folder holds them
    rows: list[ResultRow]
    traces: list[dict[str, Any]]  # of each image; see `Trace.per_image`
    seconds: float
    seed: int


class Engine:
    """A process's only device, on which one job is drawn at a time. Use it as a context manager.

    Args:
        device: Where pictures are drawn.
        max_rows: The most denoiser rows that the guided pictures of one job may cost.
    """

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self.device, self._max_rows = device, max_rows
        self._parser = Parser(prog="svdd app")
        for name, kind in _PARTS.items():
            self._parser.add_argument(f"--{name}", type=kind)
        self._around, self._picture_bytes = ExitStack(), 0

    def __enter__(self) -> "Engine":
        threads = torch.get_num_threads()
        self._around.enter_context(keeping_weights())
        set_threads: Any = torch.set_num_threads
        pool = ThreadPoolExecutor(1, "svdd-app", initializer=set_threads, initargs=(threads,))
        self._pool = self._around.enter_context(pool)
        return self

    def __exit__(self, *error: object) -> None:
        self._around.close()

    def draw(self, wanted: Wanted, stop: Event) -> Iterator[Progress | Drawn]:
        """Yields where the job is, at least once a second, the unguided pictures, and the guided ones.

        Closing the iterator stops the job.

        Raises:
            UserError: If the settings cannot be used, or the job would cost too much.
            Stopped: If `stop` was set; within one step.
        """
        found: queue.Queue[Progress | Drawn] = queue.Queue()
        job = self._pool.submit(self._draw, wanted, stop, found.put)
        last: Progress | None = None
        try:
            while not (job.done() and found.empty()):
                try:
                    update = found.get(timeout=0.2)
                except queue.Empty:
                    if last is not None:
                        yield last
                    continue
                if isinstance(update, Drawn) or found.empty():  # the page shows the latest only
                    yield update
                last = update if isinstance(update, Progress) else None
            job.result()
        finally:
            stop.set()

    def open(self, wanted: Wanted) -> float | None:
        """Loads the model and the rewards, which raises UserError if they cannot be used.

        Returns the model's scale of classifier-free guidance; None if it has none.
        """
        return self._pool.submit(self._open, wanted).result()

    def _open(self, wanted: Wanted) -> float | None:
        model = self._model(wanted)
        model.configure_model()
        diffusion = model.diffusion
        with torch.inference_mode(), float32_default():
            picture = diffusion.decode(torch.zeros(1, *diffusion.latent_shape).to(self.device, diffusion.dtype))
        self._picture_bytes = 4 * picture.numel()
        return diffusion.guidance_scale

    def _model(self, wanted: Wanted) -> GuidedDiffusion:
        settings = dict(wanted.model)
        with as_user_errors():
            parsed = self._parser.parse_object({name: settings.pop(name) for name in _PARTS if name in settings})
            next_run(str(self.device), latest_only=True)
            parts = self._parser.instantiate(parsed).as_dict()
            parts["eval_rewards"], parts["value"] = parts["eval_rewards"] or [], parts["value"] or PosteriorMean()
            self._fit_cost(parts, settings)
            return GuidedDiffusion(**parts, **settings).to(self.device).eval()

    def _fit_cost(self, parts: dict[str, Any], settings: dict[str, Any]) -> None:
        """Fits the sampler to the budget; UserError if the job costs too many rows or holds too many pictures."""
        images, budget = settings["images_per_prompt"], settings.pop("budget", None)
        most = self._max_rows // images
        over = f"this job costs more than {self._max_rows} denoiser rows, the most that this page draws"
        over += "; lower the counts of the sampler, the steps, the images or the budget"
        diffusion, value = parts["diffusion"], parts["value"]
        if budget is not None and budget > most:
            raise UserError(over)
        try:
            if budget is not None:
                parts["sampler"] = fit_budget(parts["sampler"], budget, diffusion, value, limit=most)
            cost = count(parts["sampler"], diffusion, value, limit=most)
        except UserError as error:
            raise UserError(str(error) or over) from error  # beyond the limit, the count has no message
        if (held := cost.together * images * self._picture_bytes) > _MAX_DECODED:
            what = f"this job holds {held / 2**30:.1f} GiB of decoded pictures at once, and the page at most 1"
            raise UserError(f"{what}; lower the images or the candidates and particles of a step")

    def _draw(self, wanted: Wanted, stop: Event, put: Callable[[Progress | Drawn], None]) -> None:
        try:
            if stop.is_set():
                raise Stopped
            guided = self._model(wanted)
            plain = GuidedDiffusion(
                guided.reward,
                guided.diffusion,
                Unguided(),
                eval_rewards=[*guided.eval_rewards],
                images_per_prompt=guided.images_per_prompt,
                seed=guided.seed,
            )
            guided.configure_model()
            prompt = Prompt(0, wanted.prompt, None, None, {})
            for model in (plain, guided):
                put(_drawn(model, prompt, model is guided, stop, put))
        finally:
            gc.collect()


def _drawn(
    model: GuidedDiffusion, prompt: Prompt, guided: bool, stop: Event, put: Callable[[Progress | Drawn], None]
) -> Drawn:
    """Draws a prompt's pictures and reports where they are."""
    preview = _Preview(model.diffusion, model.images_per_prompt)
    steps = model.diffusion.num_inference_steps
    values: list[float | None] = [None]

    def on_step(i: int, value: float | None) -> None:
        if stop.is_set():
            raise Stopped
        values.append(values[-1] if value is None else value)
        put(Progress(guided, i, steps, values[-1], preview.frames))

    def look(i: int, state: State) -> None:
        if not state.done:
            preview.look(state)

    model.on_step = on_step
    began = time.perf_counter()
    with torch.inference_mode(not model.sampler.needs_gradient):
        prediction = model.predict([prompt], Recorder(callback=look))
    seconds = time.perf_counter() - began
    if stop.is_set():
        raise Stopped
    files = [file for _, file in encoded(pixels_of(prediction), prediction.rows)]
    return Drawn(guided, files, prediction.rows, prediction.traces, seconds, model.seed)


class _Preview:
    """The x0 of each image's first particle, now and then, by the model's small decoder if it has one."""

    def __init__(self, diffusion: Diffusion, images: int) -> None:
        self.frames: list[Tensor | None] = [None] * images
        self._decode: Any = diffusion.decode
        self._next = 0.0
        with suppress(UserError):  # this model has none, or it is not on this machine
            self._decode = diffusion.load_decoder("tiny").to(diffusion.device).eval()

    def look(self, state: State) -> None:
        """Decodes the present predictions, unless it has just done so."""
        if time.monotonic() < self._next:
            return
        x0 = state.x0  # which the state keeps, so with the graph that the sampler may need
        with torch.no_grad():
            images = self._decode(x0.view(state.num_images, -1, *x0.shape[1:])[:, 0])
        images = images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        self.frames = list(self.frames)
        for image, frame in zip(state.context.images, images, strict=True):
            self.frames[image] = frame
        self._next = time.monotonic() + _EVERY
