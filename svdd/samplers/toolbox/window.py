"""The steps at which a sampler guides."""

import math

from svdd import require_at_least, require_numbers

__all__ = ["Window"]


class Window:
    """The steps with start <= i / T < stop, or every k-th of them, counted back from the last: the best informed.

    Args:
        start: First guided step, as a fraction of the chain, 0 .. 1.
        stop: Where guidance ends, as a fraction of the chain, above `start`, at most 1.
        every: k, steps from one guided step to the next, at least 1.
    """

    def __init__(self, start: float = 0.0, stop: float = 1.0, every: int = 1) -> None:
        require_numbers(guide_start=start, guide_stop=stop)
        if not 0 <= start < stop <= 1:
            raise ValueError(f"guide_start and guide_stop must satisfy 0 <= start < stop <= 1, got {start} and {stop}")
        require_at_least(1, guide_every=every)
        self.start, self.stop, self.every = start, stop, every

    def guides(self, i: int, num_inference_steps: int) -> bool:
        """Whether the step from i to i + 1 of a chain of that length is guided."""
        # The smallest i with i / T >= a fraction; 0.28 * 25 = 7.000000000000001 counts as 7.
        first, end = (math.ceil(round(fraction * num_inference_steps, 9)) for fraction in (self.start, self.stop))
        return first <= i < end and (end - 1 - i) % self.every == 0
