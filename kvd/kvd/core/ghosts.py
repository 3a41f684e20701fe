"""What was dropped of a tenant's blocks lately, when, and why: to explain what is not found.

A ghost is a block's key, 16 bytes, with a moment and a reason; so it can be found only by who knows
the tokens. Each tenant has its own, as many as it may have: what one learns of them, and for how
long it is remembered, says nothing of another.

They are kept in generations, so that noting one is a store into a dict and nothing is ever searched
for: when a generation is full the oldest goes as a whole. Not kept over a restart.

    8,192    8,192    ...    8,192    young
      └ goes when the young one is full
"""

from collections import deque
from typing import NamedTuple

from kvd.core.reasons import Reason

GENERATION = 8192
"""Ghosts: about 0.5 ms to free at once. With its key and moment each takes some 200 bytes."""
GENERATIONS = 8
MAX_ARENAS = 64
"""Models that gave way and are remembered."""


class Ghost(NamedTuple):
    """When a block was dropped, in the clock of the events, and why."""

    when: float
    reason: Reason


class _Generation(NamedTuple):
    first: float
    """When its first was noted."""
    ghosts: dict[bytes, Ghost]


class Ghosts:
    """Those of one tenant."""

    __slots__ = ("_last", "_old", "_reason", "_when", "_young", "arenas", "complete_since")

    def __init__(self) -> None:
        self._young: dict[bytes, Ghost] = {}
        self._old: deque[_Generation] = deque()
        self._when: float | None = None
        self._reason: Reason | None = None
        self._last: Ghost
        self.complete_since: float | None = None
        """From when on every block that was dropped is here; None: from the beginning."""
        self.arenas: dict[bytes, float] = {}
        """By fingerprint: when all blocks of a model went, because it gave way to another."""

    def __len__(self) -> int:
        return len(self._young) + sum(len(each.ghosts) for each in self._old)

    def note(self, key: bytes, when: float, reason: Reason) -> None:
        """A block is dropped. It is in the way of every eviction."""
        if when is not self._when or reason is not self._reason:
            # All that one event drops shares one: half of the cost, and of the memory.
            self._when, self._reason = when, reason
            self._last = Ghost(when, reason)
        young = self._young
        young[key] = self._last
        if len(young) >= GENERATION:
            self._age()

    def note_arena(self, fingerprint: bytes, when: float) -> None:
        """All that was cached of a model is gone, without a word of its blocks."""
        self.arenas.pop(fingerprint, None)
        self.arenas[fingerprint] = when
        if len(self.arenas) > MAX_ARENAS:
            del self.arenas[next(iter(self.arenas))]

    def find(self, key: bytes) -> Ghost | None:
        """When and why the block of this key was dropped last, if that is remembered."""
        found = self._young.get(key)
        for generation in reversed(self._old) if found is None else ():
            found = generation.ghosts.get(key)
            if found is not None:
                break
        return found

    def _age(self) -> None:
        first = next(iter(self._young.values())).when
        self._old.append(_Generation(first, self._young))
        self._young = {}
        if len(self._old) == GENERATIONS:
            self._old.popleft()
            self.complete_since = self._old[0].first
