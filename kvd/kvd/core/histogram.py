"""A histogram with fixed bounds: counting a value is one bisection and two additions.

Pure: it is the core's for ages of blocks and the shell's for durations. What is shown of it:
kvd.metrics.
"""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """How many values were at most each of `bounds` (ascending), and more than the one before; the
    last of `counts` is for those above all bounds. `total` is their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        """What it is at this moment."""
        other = Histogram(self.bounds)
        other.counts = list(self.counts)
        other.total = self.total
        return other
