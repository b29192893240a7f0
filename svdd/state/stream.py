"""Random numbers of one image, which may be drawn ahead while the network works."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

__all__ = ["Stream", "draw_ahead"]


class Stream:
    """The numbers of one CPU generator, in the order in which they are asked for.

    What was drawn ahead is returned if the same numbers are asked for next; otherwise the generator goes back to where
    it was. The numbers are those without drawing ahead, bit for bit.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._before: Tensor | None = None  # the generator's state, if numbers were drawn ahead
        self._ahead: Future[Tensor] | None = None
        self._kind: tuple[Sequence[int], torch.dtype] | None = None

    @staticmethod
    def seeded(seed: int) -> "Stream":
        """Returns a stream that begins at the seed."""
        return Stream(torch.Generator().manual_seed(seed))

    def normals(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Draws standard normal numbers."""
        if self._ahead is not None and self._kind == (shape, dtype):
            found, self._ahead = self._ahead, None
            return found.result()
        return torch.randn(*shape, generator=self.generator, dtype=dtype)

    def uniforms(self, k: int) -> Tensor:
        """Draws k uniform numbers in [0, 1), float64."""
        return torch.rand(k, generator=self.generator, dtype=torch.float64)

    def clone(self) -> "Stream":
        """Returns a stream that continues with the same numbers."""
        return Stream(self.generator.clone_state())

    def get_state(self) -> Tensor:
        """Returns the state of the generator."""
        return self.generator.get_state()

    @property
    def generator(self) -> torch.Generator:
        """The generator, without what was drawn ahead."""
        if self._ahead is not None:
            self._ahead.exception()  # waits
            assert self._before is not None
            self._generator.set_state(self._before)
            self._ahead = None
        return self._generator


def draw_ahead(streams: Sequence[Stream], shape: Sequence[int], dtype: torch.dtype) -> None:
    """Begins to draw, in a thread, what a call of `normals` with these arguments would return from each stream."""
    if len(set(map(id, streams))) < len(streams):
        return  # the second draw of a stream would depend on the first
    drawn: list[tuple[torch.Generator, Future[Tensor]]] = []
    for stream in streams:
        generator, future = stream.generator, Future[Tensor]()
        stream._before, stream._kind, stream._ahead = generator.get_state(), (shape, dtype), future
        drawn.append((generator, future))

    def draw() -> None:
        for generator, future in drawn:
            try:
                future.set_result(torch.randn(*shape, generator=generator, dtype=dtype))
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=draw, name="svdd random numbers", daemon=True).start()
