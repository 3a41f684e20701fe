"""Whose time is over when: requests that wait for an id, sequences that nobody uses, and pins.

Does not cover what happens then: allocating.py.
"""

from heapq import heapify, heappop, heappush
from typing import NamedTuple

from kvd.core.pins import Pin
from kvd.core.sequences import Sequence, Waiter

Timed = Waiter | Sequence | Pin

SMALL = 64
"""Below so many entries it is not worth looking for those that are out of date."""


class _Entry(NamedTuple):
    when: float
    number: int
    """Entries of one moment in the order of their coming; makes all entries different."""
    owner: Timed


class Deadlines:
    """A heap of owners by `due`, which may become None or move to later, but never to earlier.

    An entry is put right when it has come to the top, and the others when they have doubled since
    the last time: all calls are O(log n) amortised, n being the owners that have a deadline.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._added = 0
        self._limit = SMALL

    def __len__(self) -> int:
        """Entries, those out of date included."""
        return len(self._heap)

    def add(self, owner: Timed) -> None:
        """From now on `owner` is heard of when it is due. Once for each owner."""
        when = owner.due
        if when is None:
            return
        self._added += 1
        heappush(self._heap, _Entry(when, self._added, owner))
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if entry.owner.due is not None]
            heapify(self._heap)
            self._limit = max(SMALL, 2 * len(self._heap))

    def next(self) -> float | None:
        """When the first owner is due; None if none is."""
        while self._heap:
            when, number, owner = self._heap[0]
            due = owner.due
            if due == when:
                return when
            heappop(self._heap)
            if due is not None:
                heappush(self._heap, _Entry(due, number, owner))
        return None

    def pop(self, now: float) -> Timed | None:
        """Take out the first owner that is due at `now`; None if none is."""
        when = self.next()
        if when is None or when > now:
            return None
        return heappop(self._heap).owner
