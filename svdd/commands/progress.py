"""How far a run is and how long the rest takes: bars on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
from tqdm import tqdm

from svdd import printable, say

__all__ = ["Pace", "ProgressBars", "ProgressLines", "duration", "progress"]

_REFRESH = 0.1  # seconds between two drawings of the bars
_EVERY, _SHARE = 30.0, 0.05  # a line after these seconds or this share of the images
_LEAST = 1.0  # seconds between two lines


class Pace:
    """Counts images, those of the batch that is being drawn in part, and predicts the time that the others take.

    Args:
        images: How many are to be drawn.
        clock: Returns seconds.
    """

    def __init__(self, images: int, clock: Callable[[], float]) -> None:
        self.images, self._clock = images, clock
        self._finished, self.batch_images, self.fraction = 0, 0, 0.0
        self._start = self._batch_start = clock()

    def begin_batch(self, images: int) -> None:
        """Begins a batch, and with it the batch's own clock."""
        self.batch_images, self.fraction, self._batch_start = images, 0.0, self._clock()

    def advance(self, fraction: float) -> None:
        """Says how much of the batch is done; less than before has no effect."""
        self.fraction = max(self.fraction, min(fraction, 1.0))

    def end_batch(self) -> None:
        """Ends the batch, whatever was said about it."""
        self._finished, self.batch_images, self.fraction = self._finished + self.batch_images, 0, 0.0

    @property
    def done(self) -> float:
        """Images that are drawn, with the share of the batch."""
        return self._finished + self.batch_images * self.fraction

    @property
    def seconds_each(self) -> float | None:
        """Seconds an image has taken; None before anything is done."""
        return (self._clock() - self._start) / self.done if self.done > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that the other images will take; None before anything is done."""
        return None if self.seconds_each is None else self.seconds_each * max(self.images - self.done, 0)

    @property
    def batch_seconds(self) -> float:
        """Seconds since the batch began."""
        return self._clock() - self._batch_start


class _Progress(L.Callback):
    """Follows the prediction of this process; a subclass shows it.

    Args:
        earlier: Prompts that an earlier run has finished.
        label: What stands before everything, such as the cell of a study.
        clock: Returns seconds.
    """

    def __init__(self, earlier: int = 0, label: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._earlier, self._label, self._clock = earlier, label, clock
        self._pace = Pace(0, clock)
        self._value, self._step = "", 0
        self._total, self._scored = 0.0, 0

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Registers for the steps of the module."""
        cost = pl_module.cost
        self._each = pl_module.images_per_prompt * (1 if cost is None else cost.returned)
        self._module, self._follow = pl_module, pl_module.on_step
        self._where = f" of process {trainer.global_rank} of {trainer.world_size}" if trainer.world_size > 1 else ""
        self._pace = Pace(trainer.predict_dataloaders.dataset.num_prompts * self._each, self._clock)
        self._total, self._scored, self._value = 0.0, 0, ""
        pl_module.on_step = self._on_step
        self._open()

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *indices: int) -> None:
        """Begins a batch."""
        self._pace.begin_batch(len(batch) * self._each)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int) -> None:
        """Counts the batch and its rewards."""
        self._pace.end_batch()
        for row in outputs.rows:
            self._total, self._scored = self._total + row["rewards"][pl_module.reward.name], self._scored + 1
        self._show()

    def on_predict_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Ends what is shown, so that it does not overwrite what is printed next."""
        pl_module.on_step = getattr(self, "_follow", None)
        self._close()

    on_exception = on_predict_end

    def _on_step(self, i: int, value: float | None) -> None:
        """Takes the share of the batch from the rows that its ledger counts, which no sampler takes back."""
        model, steps = self._module, self._module.diffusion.num_inference_steps
        if model.cost is not None and model.cost.network_rows > 0:
            whole = model.diffusion.network_rows(model.diffusion.guidance_scale)
            rows = model.cost.network_rows * whole * self._pace.batch_images
            self._pace.advance(model.ledger.network_rows / rows)
        else:
            self._pace.advance(i / steps)
        if value is not None:
            self._value = f", mean value {value:.4g}"
        self._step = i
        self._show()

    @property
    def _counted(self) -> int:
        """Images of an earlier run that count; one of several processes counts its own share only."""
        return 0 if self._where else self._earlier * self._each

    @property
    def _share(self) -> float:
        """The share of the images that is done."""
        return (self._pace.done + self._counted) / max(self._pace.images + self._counted, 1)

    def _text(self) -> str:
        """Returns what is done, at which rate, and the time left."""
        pace, earlier = self._pace, self._earlier * self._each
        counted = f"{int(pace.done) + self._counted:,} of {pace.images + self._counted:,} images{self._where}"
        counted += f" ({earlier:,} done earlier)" if earlier else ""
        if pace.seconds_each is None or pace.left is None:
            return counted
        return f"{counted}, {pace.seconds_each:.3g} s an image, {duration(pace.left)} left"

    def _open(self) -> None: ...

    def _show(self) -> None: ...

    def _close(self) -> None: ...


class ProgressBars(_Progress):
    """A bar for the images of this process, and one for the steps of the batch, on a terminal."""

    _bars: tuple[Any, ...] = ()

    def _open(self) -> None:
        style: dict[str, Any] = {"total": 1.0, "bar_format": "{bar}", "file": sys.stderr, "ncols": _columns()}
        self._bars = (tqdm(position=0, **style), tqdm(position=1, leave=False, **style))
        self._shown = -_REFRESH
        self._show()

    def _show(self) -> None:
        pace, steps = self._pace, self._module.diffusion.num_inference_steps
        if self._clock() - self._shown < _REFRESH and pace.fraction > 0:
            return
        self._shown = self._clock()
        batch = f"step {self._step} of {steps}{self._value}, {duration(pace.batch_seconds)}"
        for bar, share, text in zip(self._bars, (self._share, pace.fraction), (self._text(), batch), strict=True):
            shown = printable(text).replace("{", "{{").replace("}", "}}")
            bar.bar_format, bar.n = f"{printable(self._label)}{{percentage:3.0f}}%|{{bar}}| {shown}", share
            bar.ncols = _columns()
            bar.refresh()

    def _close(self) -> None:
        for bar in reversed(self._bars):
            bar.close()
        self._bars = ()


class ProgressLines(_Progress):
    """A line on stderr every 30 s, or every 5 % if that is sooner, and at most one a second."""

    def _open(self) -> None:
        self._said, self._said_done = self._clock(), 0.0

    def _show(self) -> None:
        passed, done = self._clock() - self._said, self._pace.done
        if passed < _LEAST or (passed < _EVERY and done - self._said_done < _SHARE * self._pace.images):
            return
        self._said, self._said_done = self._clock(), done
        mean = f", mean {self._module.reward.name} {self._total / self._scored:.4g}" if self._scored else ""
        say(f"svdd: {self._label}{self._share:.0%}, {self._text()}{mean}", error=True)


def _columns() -> int:
    """Returns the width of the terminal, which may have changed; 80 if it does not say."""
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def progress(earlier: int = 0, label: str = "") -> _Progress:
    """Returns the callback for this process's stderr."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return (ProgressBars if terminal else ProgressLines)(earlier, label)


def duration(seconds: float) -> str:
    """Returns a time as 1:05, 2:03:04 or 3 days 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock
