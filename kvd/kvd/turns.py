"""Whose job the copier's thread goes on with: fair between clients, and safe for the memory.

A long job is done in steps, and between two of them others get their turn. Who waits behind whom:

    COPY   nobody behind anybody, but for the jobs of one lane (a session), first in, first out: the
           core copies only into slots whose memory is there, and leaves a slot alone until its copy
           has ended, so no order of copies and other jobs can do harm
    FREE   gives memory back. First in, first out, and ahead of all TAKEs, which count with what the
           FREEs before them give back. (Never the other way round: what is still being taken, the
           core does not give back.)
    TAKE   gives slots or a staging memory. The lanes take turns, each is first in, first out
    ALONE  looks at what memory there is, so it comes behind every FREE and TAKE before it, and
           ahead of all that come after it

Copies alternate with the others, so that neither waits for all of the other's steps. Pure: what a
step is, and the thread: copier.py.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

J = TypeVar("J")


class Order(Enum):
    """What may go ahead of a job; see the module."""

    COPY = "copy"
    FREE = "free"
    TAKE = "take"
    ALONE = "alone"


@dataclass(slots=True, eq=False)
class Entry(Generic[J]):
    """A job that is queued or in the middle of its steps."""

    job: J
    order: Order
    lane: Hashable


class Turns(Generic[J]):
    """All jobs that are not done. One thread."""

    def __init__(self) -> None:
        self._copies: _Lanes[J] = _Lanes()
        self._takes: _Lanes[J] = _Lanes()
        self._frees: deque[Entry[J]] = deque()
        self._alone: Entry[J] | None = None
        self._behind: deque[Entry[J]] = deque()
        """What came after the one that must be alone."""
        self._is_copies_turn = False

    def add(self, job: J, order: Order, lane: Hashable) -> None:
        """Queue a job. Jobs of one lane and order are done in the order in which they come."""
        entry = Entry(job, order, lane)
        if order is Order.COPY:
            self._copies.add(entry)
        elif self._alone is not None:
            self._behind.append(entry)
        else:
            self._queue(entry)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is queued."""
        memory = self._frees or self._takes.first() or self._alone
        return not memory and self._copies.first() is None

    def next(self) -> Entry[J] | None:
        """Whose turn it is; None if nothing is queued. Call `done` or `pause` before the next."""
        memory = self._frees[0] if self._frees else self._takes.first() or self._alone
        copy = self._copies.first()
        chosen = copy if memory is None or (copy is not None and self._is_copies_turn) else memory
        self._is_copies_turn = chosen is not copy
        return chosen

    def takes(self) -> Iterator[J]:
        """All that are queued to take memory."""
        return self._takes.jobs()

    def pause(self, entry: Entry[J]) -> None:
        """One step is done; others first, then the next."""
        if entry.order is Order.COPY:
            self._copies.rotate()
        elif entry.order is Order.TAKE:
            self._takes.rotate()

    def done(self, entry: Entry[J]) -> None:
        """The job is done."""
        match entry.order:
            case Order.COPY:
                self._copies.pop()
            case Order.TAKE:
                self._takes.pop()
            case Order.FREE:
                self._frees.popleft()
            case Order.ALONE:
                self._alone = None
                while self._behind and self._alone is None:
                    self._queue(self._behind.popleft())

    def _queue(self, entry: Entry[J]) -> None:
        match entry.order:
            case Order.TAKE:
                self._takes.add(entry)
            case Order.FREE:
                self._frees.append(entry)
            case _:
                self._alone = entry


class _Lanes(Generic[J]):
    """Queues of which the first one has its turn."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, deque[Entry[J]]] = OrderedDict()

    def add(self, entry: Entry[J]) -> None:
        self._lanes.setdefault(entry.lane, deque()).append(entry)

    def first(self) -> Entry[J] | None:
        return next(iter(self._lanes.values()))[0] if self._lanes else None

    def jobs(self) -> Iterator[J]:
        return (entry.job for lane in self._lanes.values() for entry in lane)

    def rotate(self) -> None:
        self._lanes.move_to_end(next(iter(self._lanes)))

    def pop(self) -> None:
        lane, queue = next(iter(self._lanes.items()))
        queue.popleft()
        if queue:
            self._lanes.move_to_end(lane)
        else:
            del self._lanes[lane]
