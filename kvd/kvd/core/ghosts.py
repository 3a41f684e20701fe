"""What was dropped of a tenant's blocks lately, when, and why: to explain what is not found.

A ghost is a block's key, 16 bytes, with a moment and a reason; so it can be found only by who knows
the tokens. Each tenant has its own, as many as it may have: what one learns of them, and for how
long it is remembered, says nothing of another.

They are kept in generations: when one is full the oldest goes as a whole, and nothing is ever
searched for when a block is dropped. Noting it is in the way of every eviction, and hardly ever
does anybody ask: so it is an append to a list, and a dict is made of that when somebody does.

    8,192    8,192    ...    8,192    young
      └ goes when the young one is full

They are counted there, too: by their runs, not one by one. Not kept over a restart.
"""

import math
from collections import deque
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from kvd.core.reasons import Reason
from kvd_proto.keys import KEY_BYTES

GENERATION = 8192
"""Ghosts: about 0.3 ms to free at once, and 1 ms to make a dict of, once. Each takes 72 bytes, and
in a dict twice as many."""
GENERATIONS = 8
MAX_ARENAS = 64
"""Models that gave way and are remembered."""

_key = itemgetter(slice(KEY_BYTES))


class Ghost(NamedTuple):
    """When a block was dropped, in the clock of the events, and why."""

    when: float
    reason: Reason


class _Generation:
    __slots__ = ("_found", "_runs", "first", "noted", "room", "run_start")

    def __init__(self) -> None:
        self._found: dict[bytes, Ghost] = {}
        self.noted: list[bytes] = []
        """Keys, with whatever follows them, that are not in the dict yet."""
        self.room = GENERATION
        """When so many are noted, it is full."""
        self._runs: list[tuple[int, Ghost]] = []
        """From this index of `noted` on, each is like this one."""
        self.run_start = 0
        """Of the last run, the index of the first that `end_run` has not counted."""
        self.first: float | None = None
        """When its first was noted."""

    def __len__(self) -> int:
        return len(self._found) + len(self.noted)

    def begin_run(self, ghost: Ghost) -> None:
        """What is noted from now on is like this one."""
        if self.first is None:
            self.first = ghost.when
        self._runs.append((len(self.noted), ghost))

    def end_run(self) -> int:
        """How many were noted since this was asked last."""
        n_noted = len(self.noted) - self.run_start
        self.run_start = len(self.noted)
        return n_noted

    def find(self, key: bytes) -> Ghost | None:
        """Only when the last run has been counted."""
        if self.noted:
            (_, last) = self._runs[-1]
            for (start, ghost), (end, _) in pairwise([*self._runs, (len(self.noted), last)]):
                self._found |= dict.fromkeys(map(_key, self.noted[start:end]), ghost)
            self.noted.clear()
            self.run_start = 0
            self.room = GENERATION - len(self._found)
            self._runs = [(0, last)]
        return self._found.get(key)


class Ghosts:
    """Those of one tenant, and how many there ever were."""

    __slots__ = ("_counts", "_old", "_reason", "_when", "_young", "arenas", "complete_since")

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Reason, 0)
        self._young = _Generation()
        self._old: deque[_Generation] = deque()
        self._when = math.nan
        self._reason = Reason.ROOM
        self.complete_since: float | None = None
        """From when on every block that was dropped is here; None: from the beginning."""
        self.arenas: dict[bytes, float] = {}
        """By fingerprint: when all blocks of a model went, because it gave way to another."""

    def __len__(self) -> int:
        return len(self._young) + sum(map(len, self._old))

    @property
    def counts(self) -> dict[Reason, int]:
        """How many blocks were ever dropped, by the reason."""
        self._count()
        return dict(self._counts)

    def noted(self, when: float, reason: Reason) -> list[bytes]:
        """Where to append the keys of blocks that are dropped, at once and far fewer than a
        generation. Each may go on after the key. It is in the way of every eviction."""
        young = self._young
        if len(young.noted) >= young.room:
            young = self._age()
        if when is not self._when or reason is not self._reason:
            # All that one event drops shares one, and is counted at once.
            self._count()
            self._when, self._reason = when, reason
            young.begin_run(Ghost(when, reason))
        return young.noted

    def note_arena(self, fingerprint: bytes, when: float, n_blocks: int) -> None:
        """All that was cached of a model is gone, without a word of its blocks."""
        self._counts[Reason.ARENA] += n_blocks
        self.arenas.pop(fingerprint, None)
        self.arenas[fingerprint] = when
        if len(self.arenas) > MAX_ARENAS:
            del self.arenas[next(iter(self.arenas))]

    def find(self, key: bytes) -> Ghost | None:
        """When and why the block of this key was dropped last, if that is remembered."""
        self._count()
        found = self._young.find(key)
        for generation in reversed(self._old) if found is None else ():
            found = generation.find(key)
            if found is not None:
                break
        return found

    def _count(self) -> None:
        self._counts[self._reason] += self._young.end_run()

    def _age(self) -> _Generation:
        self._count()
        self._old.append(self._young)
        self._young = young = _Generation()
        self._when = math.nan  # what comes begins anew
        if len(self._old) == GENERATIONS:
            self._old.popleft()
            self.complete_since = self._old[0].first
        return young
