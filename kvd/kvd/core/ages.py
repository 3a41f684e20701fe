"""How old blocks get: for how long they were idle when they were evicted or found again, and for
how long they had been there.

A block has no time of day. It has the moments, of the logical clock, at which it was sealed
(`generation`) and used last (its value in the LRU). Here is at what time the clock stood where,
once a second: so ages are right to a second, and cost no memory for a block. What an earlier daemon
left counts from this one's start.

    clock   0 ......... 17 ......... 18 ......... 95 ....   a moment begins with a tick of its own
    time    12.0        13.1         20.4         21.4      the first event a second later, or more

Times come in with the events. Does not cover who evicts and why: budget.py.
"""

from bisect import bisect_left
from typing import TYPE_CHECKING

from kvd.core.histogram import Histogram

if TYPE_CHECKING:
    from kvd.core.tree import Block

MOMENT_SECONDS = 1.0
MOST_MOMENTS = 4096
"""When there are so many, they are thinned out."""
RESOLUTION = 128
"""The age of what is older is known to a 128th of it."""
SAMPLED = 32
"""One eviction, and one reuse, in so many is looked at, the first among them."""
BOUNDS = (1, 5, 15, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600, 168 * 3600)
"""Seconds, to a week."""


class Ages:
    """The time of the clock, and what is counted with it. Seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        """When the last moment began: right to a second, as all ages are."""
        self.due = float("-inf")
        """When the next moment begins, if anything happens then."""
        self._clocks = [0]
        self._times = [0.0]
        self.idle = Histogram(BOUNDS)
        self.lifetime = Histogram(BOUNDS)
        self.reuse_gap = Histogram(BOUNDS)
        self._reuses = 0

    def begin(self, clock: int, now: float) -> None:
        """From now on the clock stands above `clock`."""
        self.now = now
        self.due = now + MOMENT_SECONDS
        if not clock:  # the start
            self._times = [now]
            return
        if len(self._clocks) >= MOST_MOMENTS:
            self._thin_out(now)
        self._clocks.append(clock)
        self._times.append(now)

    def time_of(self, clock: int) -> float:
        """When the clock stood there, or up to a second before that."""
        return self._times[max(0, bisect_left(self._clocks, clock) - 1)]

    def evicted(self, block: "Block", last_use: int) -> None:
        """A block goes that was used last at this moment of the clock."""
        self.idle.observe(self.now - self.time_of(last_use))
        self.lifetime.observe(self.now - self.time_of(block.generation))

    def reused(self, last_use: int) -> None:
        """A cached prefix is used again."""
        if self._reuses % SAMPLED == 0:
            self.reuse_gap.observe(self.now - self.time_of(last_use))
        self._reuses += 1

    def _thin_out(self, now: float) -> None:
        """Keep a moment only if without it the age of the one before would be known less exactly
        than is promised. Half a millisecond, once in half an hour."""
        times = self._times
        kept = [0]
        for index in range(1, len(times) - 1):
            after = times[index + 1]
            if (after - times[kept[-1]]) * RESOLUTION > now - after:
                kept.append(index)
        kept.append(len(times) - 1)
        self._clocks = [self._clocks[index] for index in kept]
        self._times = [times[index] for index in kept]
