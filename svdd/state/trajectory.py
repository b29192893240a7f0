"""How the images of one call came about: predictions of x0 on the way, values, and ancestors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from svdd import UserError, is_integer, require_at_least
from svdd.diffusion.base import Diffusion
from svdd.state.recorder import Particles, Recorder, recorded
from svdd.state.state import State
from svdd.state.trace import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trajectory", "frame_steps"]

_PLOTS = (".pdf", ".png", ".svg")
_UNKNOWN = 127  # grey, in place of a frame whose particle is not known


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory:
    """The way to each of n images, which `GuidedDiffusion.sample` returns on request.

    The way of an image is that of its ancestors: one particle at each step. Where a sampler passes a step several
    times, as searches do, it is the last time among the image's ancestors.
    """

    prompts: list[str]  # of each image, [n]
    seeds: list[int]  # of each image, [n]
    scores: Tensor  # the guide reward of each image, float32 [n]
    steps: list[int]  # the steps of the frames, rising, 0 .. T
    frames: Tensor  # decoded x0 of the ancestors at these steps, uint8 [frames, n, 3, h, w]; at T the images themselves
    ancestors: Tensor  # the particle of each step from which an image descends, int64 [n, T + 1]; -1 if unknown
    particles: Particles  # of all images: step, image of the batch, parent and value of each
    selections: list[Selection]  # with the values of all candidates, [images of the batch, candidates], in order

    @staticmethod
    def of(recorder: Recorder, final: State, seeds: Sequence[int], scores: Tensor) -> "Trajectory":
        """Collects what was recorded about the images of a final state, with the seed of each; decodes the frames."""
        ends, particles = recorded(final), recorder.particles
        assert ends is not None
        ancestors = _ancestors(ends.cpu(), particles, final.num_steps)
        steps, shape = sorted(recorder.frames), final.images.shape[1:]
        frames = torch.full((len(steps), len(ancestors), *shape), _UNKNOWN, dtype=torch.uint8)
        places = [
            (k, j, recorder.x0[number])
            for k, step in enumerate(steps)
            for j, number in enumerate(ancestors[:, step].tolist())
            if number in recorder.x0
        ]
        if places:
            images = _to_bytes(_decode(final.context.diffusion, torch.stack([x0 for _, _, x0 in places])))
            frames[[k for k, _, _ in places], [j for _, j, _ in places]] = images
        if final.num_steps in steps:
            frames[-1] = _to_bytes(final.images)
        selections = final.context.trace.selections
        return Trajectory(
            final.prompts, list(seeds), scores.cpu(), steps, frames, ancestors, particles, list(selections)
        )

    @property
    def values(self) -> Tensor:
        """The value of each image's ancestors, float32 [n, T + 1], at the end the reward; NaN where it is unknown."""
        known = torch.where(self.ancestors >= 0, self.particles.value[self.ancestors], math.nan)
        known[:, -1] = torch.where(known[:, -1].isnan(), self.scores, known[:, -1])
        return known

    def plot(self, images: Sequence[int] | None = None, num_frames: int = 10) -> "Figure":
        """Draws at most `num_frames` frames of each image, and below them the values and ancestors of all particles.

        Args:
            images: The images to draw, by position; by default the first four.
            num_frames: Frames in a row at most: every k-th, up to the last.

        Raises:
            UserError: If matplotlib is missing.
        """
        from svdd.state.trajectory_plot import plot

        chosen = list(range(min(4, len(self.prompts)))) if images is None else list(images)
        if bad := [k for k in chosen if not (is_integer(k) and 0 <= k < len(self.prompts))] or not chosen:
            raise UserError(f"images must be some of 0 .. {len(self.prompts) - 1}, got {bad if chosen else 'none'}")
        require_at_least(1, num_frames=num_frames)
        last = len(self.steps) - 1
        stride = max(1, math.ceil(last / max(1, num_frames - 1))) if num_frames > 1 else last + 1
        return plot(self, chosen, list(range(last, -1, -stride))[::-1])

    def save(self, path: str | Path) -> None:
        """Writes the plot (.png, .pdf, .svg), or all arrays, which `numpy.load` reads (.npz)."""
        path = Path(path).expanduser()
        if path.suffix in _PLOTS:
            self.plot(range(len(self.prompts))).savefig(path)
        elif path.suffix == ".npz":
            np.savez_compressed(path, **self._arrays())
        else:
            raise UserError(f"a trajectory is saved as {', '.join(_PLOTS)} or .npz, got {path.name!r}")

    def _arrays(self) -> dict[str, Any]:
        own = ("prompts", "seeds", "scores", "steps", "frames", "ancestors", "values")
        arrays = {name: np.asarray(getattr(self, name)) for name in own}
        arrays |= {f"particle_{name}": column.numpy() for name, column in self.particles._asdict().items()}
        for k, selection in enumerate(self.selections):
            arrays |= {f"selection_{k}_values": selection.values.cpu().numpy()}
            arrays |= {f"selection_{k}_kept": selection.kept.cpu().numpy()}
        return arrays | {"selection_steps": np.asarray([selection.i for selection in self.selections])}

    def __repr__(self) -> str:
        count, last = len(self.prompts), self.ancestors.shape[1] - 1
        frames = f"{len(self.steps)} frames at steps {self.steps[0]} to {self.steps[-1]} of {last}"
        return f"Trajectory({count} images, {frames}, {len(self.particles.step)} particles)"

    def _repr_png_(self) -> bytes | None:
        """Returns the plot for a notebook; None without matplotlib."""
        import io

        buffer = io.BytesIO()
        try:
            self.plot().savefig(buffer, format="png")
        except UserError:
            return None
        return buffer.getvalue()


def frame_steps(frames: bool | int | Sequence[int], num_steps: int) -> list[int]:
    """Returns the steps of the frames: all of 0 .. T, so many evenly spread ones with the last, or those given.

    Raises:
        UserError: If it is nothing of these.
    """
    if frames is True:
        return list(range(num_steps + 1))
    if isinstance(frames, Sequence):
        if frames and all(is_integer(i) and 0 <= i <= num_steps for i in frames):
            return sorted({int(step) for step in frames})
    elif is_integer(frames) and frames > 0:
        spread = np.linspace(num_steps, 0, min(int(frames), num_steps + 1)).round()
        return sorted({int(step) for step in spread})
    expected = f"true, a number of frames, or steps from 0 to {num_steps}"
    raise UserError(f"trajectory must be {expected}, got {frames!r}")


def _decode(diffusion: Diffusion, x0: Tensor) -> Tensor:
    """Decodes latents in chunks, outside of any ledger."""
    x0, decode = x0.to(diffusion.device), diffusion.decode
    return diffusion.chunker.map(decode, len(x0), x0, parallel=True, work=("decoder", decode))


def _ancestors(ends: Tensor, particles: Particles, num_steps: int) -> Tensor:
    """Returns the latest particle of each step from which each end descends, itself included, int64 [n, T + 1]."""
    found, current = torch.full((len(ends), num_steps + 1), -1), ends
    while len(rows := (current >= 0).nonzero().flatten()):
        numbers = current[rows]
        steps = particles.step[numbers]
        new = found[rows, steps] < 0
        found[rows[new], steps[new]] = numbers[new]
        current = current.index_put((rows,), particles.parent[numbers])
    return found


def _to_bytes(images: Tensor) -> Tensor:
    return (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
