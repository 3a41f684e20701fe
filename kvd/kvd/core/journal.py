"""What happens, for those who follow it: the last events of each tenant, in a ring.

Covers what is noted and kept, and reading it. Who asks, and when they are answered:
kvd.following.

    noted ──► │ 3 17 18 │           rare ones      two rings for each tenant, so that none can push
          ──► │ 20 21 ... 4115 │    frequent ones  out or count what is another's
                ▲ what came before is lost, and who reads is told how much

Rare events are always noted. Frequent ones (FREQUENT) only while somebody follows, so that nobody
else pays for them: an alloc costs one look at `is_followed`. They do not push out the rare ones.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from kvd_proto.happenings import FREQUENT, Kind

KEPT = 4096
"""Frequent events of one tenant: some 1.5 MiB when all are there."""
KEPT_RARE = 1024
LOOKED_AT = 1024
"""Events that one reading looks at: a fraction of a millisecond."""


class Noted(NamedTuple):
    """An event. `number` counts all of the daemon, `own` those of its tenant. `model` "": it has
    none."""

    number: int
    own: int
    when: float
    kind: Kind
    tenant: str
    model: str
    values: tuple[Any, ...]


class Read(NamedTuple):
    """Events, oldest first; where to read on; and how many were gone already before that."""

    events: list[Noted]
    next: int
    lost: int


class _Rings:
    """What is kept of one tenant; `total` was ever noted."""

    def __init__(self) -> None:
        self.total = 0
        self.rare: deque[Noted] = deque(maxlen=KEPT_RARE)
        self.frequent: deque[Noted] = deque(maxlen=KEPT)

    @property
    def both(self) -> tuple[deque[Noted], deque[Noted]]:
        return self.rare, self.frequent


class Journal:
    """The rings. `now` is the time of what is noted, by the clock that events bring."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_followed = False
        """Whether frequent events are wanted. Who notes one asks first."""
        self.total = 0
        """All that was ever noted."""
        self._rings: dict[str, _Rings] = {}

    def note(self, kind: Kind, tenant: str, model: str, *values: Any) -> None:
        """Something rare has happened now; `values` are those of its FIELDS."""
        assert kind not in FREQUENT
        rings = self._rings_of(tenant)
        noted = Noted(self.total, rings.total, self.now, kind, tenant, model, values)
        rings.rare.append(noted)
        rings.total += 1
        self.total += 1

    def note_frequent(self, kind: Kind, tenant: str, model: str, *values: Any) -> None:
        """Something of FREQUENT has happened. For whoever finds that it `is_followed`."""
        rings = self._rings_of(tenant)
        noted = Noted(self.total, rings.total, self.now, kind, tenant, model, values)
        rings.frequent.append(noted)
        rings.total += 1
        self.total += 1

    def _rings_of(self, tenant: str) -> _Rings:
        try:
            return self._rings[tenant]
        except KeyError:
            return self._rings.setdefault(tenant, _Rings())

    def end(self, tenant: str | None) -> int:
        """The number of what comes next, to one tenant or (None) to all."""
        if tenant is None:
            return self.total
        rings = self._rings.get(tenant)
        return rings.total if rings else 0

    def read(
        self,
        tenant: str | None,
        since: int,
        most: int,
        kinds: Collection[str] = (),
        model: str = "",
    ) -> Read:
        """At most `most` of the events from number `since` on: of one tenant, in its own numbers,
        or (None) of all; of some kinds (empty: all) and one model ("": all, and what has none).

        Looks at LOOKED_AT events, so it may find none although there are some, and then `next` is
        where to look on.
        """
        number = attrgetter("number" if tenant is None else "own")
        names = self._rings if tenant is None else self._rings.keys() & {tenant}
        rings = [ring for name in names for ring in self._rings[name].both]
        since = min(since, self.end(tenant))
        found: list[Noted] = []
        looked_at, following = 0, self.end(tenant)
        kept = merge(*(_from(ring, since, number) for ring in rings), key=number)
        for event in islice(kept, LOOKED_AT):
            looked_at += 1
            following = number(event) + 1
            if (not kinds or event.kind in kinds) and model in ("", event.model):
                found.append(event)
                if len(found) >= most:
                    break
        return Read(found, following, following - since - looked_at)


def _from(ring: deque[Noted], since: int, number: Callable[[Noted], int]) -> Iterator[Noted]:
    """What is in the ring from this number on."""
    return islice(ring, bisect_left(ring, since, key=number), None)
