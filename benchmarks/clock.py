"""The time that a benchmark may take."""

import math
import time

__all__ = ["Clock"]


class Clock:
    """The time that the benchmark may take, and what was left out."""

    def __init__(self, minutes: float) -> None:
        self.total, self.start, self.left_out = 60 * minutes, time.perf_counter(), list[str]()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.total - self.spent

    def fits(self, seconds: float, what: str, share: float = 1.0) -> bool:
        """Returns whether so much fits into a share of the remaining time; if not, notes what is left out."""
        if seconds > share * self.left:
            needs = f"about {seconds:.0f} s, {max(0.0, self.left):.0f} s were left"
            self.left_out.append(f"{what}: {needs if seconds < math.inf else 'out of memory'}")
        return seconds <= share * self.left
