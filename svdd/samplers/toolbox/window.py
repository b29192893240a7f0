"""The steps at which a sampler guides."""

__all__ = ["Window"]


class Window:
    """A part of the chain, guided at every k-th step.

    The step that leaves i is guided if start <= i / T < stop and its distance to the last such step is a multiple of
    `every`. The last step of the window is always guided, because later values are more accurate.

    Args:
        start: First guided step, as a fraction of the chain, 0 .. 1.
        stop: Where guidance ends, as a fraction of the chain, above `start`, at most 1.
        every: k, steps from one guided step to the next.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, start: float = 0.0, stop: float = 1.0, every: int = 1) -> None:
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"guide_start and guide_stop must satisfy 0 <= start < stop <= 1, got {start} and {stop}: they are "
                "fractions of the chain"
            )
        if every < 1:
            raise ValueError(f"guide_every must be >= 1, got {every}")
        self.start, self.stop, self.every = start, stop, every

    def guides(self, i: int, num_inference_steps: int) -> bool:
        """Whether the step from i to i + 1 of a chain of that length is guided."""
        first, last = (
            self._first_at(self.start, num_inference_steps),
            self._first_at(self.stop, num_inference_steps) - 1,
        )
        return first <= i <= last and (last - i) % self.every == 0

    @staticmethod
    def _first_at(fraction: float, steps: int) -> int:
        """Returns the smallest i with i / steps >= fraction, where 0.28 * 25 counts as 7."""
        return -int(-round(fraction * steps, 9) // 1)
