"""Who follows what happens: requests for events, each answered, and never more kept for them.

A request waits until there is something for it, or its time is over (a long poll), so a reader that
is slow loses what the journal has not kept meanwhile, is told how much, and costs the daemon
nothing. What is noted: kvd.core.journal. Who may see what: a client its own tenant's events, an
administrator all.

Those who wait are looked at ten times a second: an event is not worth an answer of its own.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvd import log
from kvd.core.cache import Cache
from kvd.core.events import SessionId
from kvd.core.journal import Noted
from kvd.requests import Incoming
from kvd_proto.errors import BadMessage, KvdError, UnknownSession
from kvd_proto.happenings import FIELDS, Kind
from kvd_proto.messages import Events, Reported

PERIOD_SECONDS = 0.1
FOLLOWED_SECONDS = 10.0
"""After the last request for events, the frequent ones are noted for so long: somebody who reads
them slowly finds them, too."""
CLOCK_STEP_SECONDS = 0.1
"""Both clocks are slewed alike: if they differ by more than before, the time of day was set."""
LOGGED_AT_ONCE = 200
"""Events, in one turn of the loop; more is more than the log keeps up with."""

_KINDS = frozenset(map(str, Kind))


class _Follower(NamedTuple):
    correlation: int
    tenant: str | None
    message: Events
    since: int
    until: float


class Followers:
    """Answers requests for events, and logs events if the log's level is debug."""

    def __init__(self, cache: Cache, reply: Callable[[SessionId, int, Any], None]) -> None:
        self._cache = cache
        self._journal = cache.budget.journal
        self._reply = reply
        self._waiting: dict[SessionId, _Follower] = {}
        """One for each session: a later request has the earlier one answered."""
        self._next_look = math.inf
        self._followed_until = -math.inf
        self._logged = 0
        self._to_wall = time.time() - time.monotonic()
        """One for all answers: read twice, an event must have the same time."""

    def ask(self, incoming: Incoming) -> None:
        """Answer now, or in `look`."""
        session, correlation, message = incoming
        now = time.monotonic()
        try:
            follower = self._follower(session, correlation, message, now)
        except KvdError as error:
            self._reply(session, correlation, error)
            return
        self._journal.is_followed = True
        self._followed_until = max(self._followed_until, follower.until + FOLLOWED_SECONDS)
        before = self._waiting.pop(session, None)
        if before is not None:
            self._answer(session, before._replace(until=now), now)
        # One that has caught up waits for its turn, or it would ask again after each event.
        behind = self._journal.end(follower.tenant) - follower.since >= message.most
        if behind:
            follower = follower._replace(until=now)
        if follower.until > now:
            self._waiting[session] = follower
            self._next_look = min(self._next_look, now + PERIOD_SECONDS)
        else:
            self._answer(session, follower, now)

    def look(self, now: float) -> float:
        """Answer those who need not wait any more; returns when to look again."""
        if (log.everything or self._journal.total != self._logged) and self._log_events():
            return now
        if now >= self._next_look:
            for session, follower in list(self._waiting.items()):
                if session not in self._cache.sessions:
                    del self._waiting[session]
                else:
                    self._answer(session, follower, now)
            self._next_look = now + PERIOD_SECONDS if self._waiting else math.inf
        if self._journal.is_followed and now >= self._followed_until:
            self._journal.is_followed = False
        ends = self._followed_until if self._journal.is_followed else math.inf
        return min(self._next_look, ends)

    def _log_events(self) -> bool:
        """Log some of what has happened, if the level is debug; whether there is more."""
        journal = self._journal
        if not log.everything:
            self._logged = journal.total
            return False
        journal.is_followed = True
        self._followed_until = max(self._followed_until, journal.now + FOLLOWED_SECONDS)
        read = journal.read(None, self._logged, LOGGED_AT_ONCE)
        self._logged = read.next
        for event in read.events:
            fields = dict(zip(FIELDS[event.kind], event.values, strict=True))
            log.debug(event.kind, tenant=event.tenant, model=event.model, **fields)
        return read.next < journal.total

    def _follower(
        self, session: SessionId, correlation: int, message: Events, now: float
    ) -> _Follower:
        asker = self._cache.sessions.get(session)
        if asker is None:
            raise UnknownSession("only a session is told what happens")
        asker.heard = now
        unknown = sorted(set(message.kinds) - _KINDS)
        if unknown:
            raise BadMessage(
                "there is no such kind of event", kind=unknown[0][:40], kinds=", ".join(Kind)
            )
        tenant = None if asker.administrator else asker.tenant.name
        since = min(message.since, self._journal.end(tenant))
        return _Follower(correlation, tenant, message, since, now + message.wait_ms / 1000)

    def _answer(self, session: SessionId, follower: _Follower, now: float) -> None:
        """Answer, or let it wait on."""
        _, _, most, kinds, model = follower.message
        read = self._journal.read(follower.tenant, follower.since, most, kinds, model)
        if not read.events and not read.lost and now < follower.until:
            self._waiting[session] = follower._replace(since=read.next)
            return
        self._waiting.pop(session, None)
        to_wall = time.time() - time.monotonic()
        if abs(to_wall - self._to_wall) > CLOCK_STEP_SECONDS:
            self._to_wall = to_wall
        report = {
            "events": [
                _report(event, follower.tenant is None, self._to_wall) for event in read.events
            ],
            "next": read.next,
            "lost": read.lost,
        }
        self._reply(session, follower.correlation, Reported(report))


def _report(event: Noted, all_tenants: bool, to_wall: float) -> dict[str, Any]:
    """A row for an event; `to_wall` makes seconds since 1970 of its time."""
    return {
        "number": event.number if all_tenants else event.own,
        "time": round(event.when + to_wall, 6),
        "kind": str(event.kind),
        "tenant": event.tenant,
        "model": event.model or None,
        **dict(zip(FIELDS[event.kind], event.values, strict=True)),
    }
