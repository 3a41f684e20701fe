"""Who asked for a report, and when it is given.

Covers requests for status, verify and lists, their order, and who may see what. What a report says:
reports.py.

A daemon without a configuration of tenants tells everything to everybody. With one, the daemon's
own user and root see everything, and others what is their tenant's. Only a session proves who asks.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

from kvd import audit, holders, log, reports
from kvd.audit import Compared
from kvd.core.accounting import report_of_pins, report_of_sequences
from kvd.core.cache import Cache
from kvd.core.events import SessionId
from kvd.core.tenants import Tenant
from kvd.holders import Holders
from kvd.requests import Incoming
from kvd.stepping import SharedWalk
from kvd.stopped import StoppedClients
from kvd.store import Store
from kvd_proto.errors import Forbidden, InternalError, KvdError, TooMany, UnknownSession
from kvd_proto.messages import ListClients, ListPins, ListSequences, Reported, Status, Verify

REPORTS = frozenset((Status, Verify, ListSequences, ListClients, ListPins))
"""The requests that are answered here."""
MAX_WAITING = 16
"""Requests for a report that one client may have open, of those that take time: more is no use to
it."""
_OURSELVES = b""
"""No session's id."""
TRIES = 5
"""How often a report is taken, if each time the system refuses memory in between."""


class Asked(NamedTuple):
    """A request for a report that takes time, whose it may be of (None: everybody's), and who takes
    the answer."""

    incoming: Incoming
    tenant: Tenant | None
    give: Callable[[Any], None]
    compared: Compared | None = None
    """What a comparison of checksums has found, if it was asked for."""


class Reporter:
    """Answers requests for reports. All who ask for one of the memory while another is being taken
    share the next one, so many who ask at once are no burden. Who asks for `verify` waits for a
    recount before, and who asks for clients for a count of what they lease: both are walks that the
    loop goes on with, step by step, as long as it `is_walking`."""

    def __init__(
        self,
        cache: Cache,
        store: Store,
        instance: str,
        reply: Callable[[SessionId, int, Any], None],
        *,
        has_tenants: bool,
    ) -> None:
        """`has_tenants`: whether there is a configuration of tenants."""
        self._has_tenants = has_tenants
        self._cache = cache
        self._store = store
        self._instance = instance
        self._reply = reply
        self._started = time.monotonic()
        self._stopped = StoppedClients()
        self._waiting: list[Asked] = []
        self._asked: list[Asked] = []
        """Those whose report is being taken."""
        self._recount: SharedWalk[Asked, list[str]] = SharedWalk(
            lambda: audit.recount(cache, store), self._recounted
        )
        self._count: SharedWalk[Asked, Holders] = SharedWalk(self._begin_count, self._counted)
        self._comparing: list[Asked] = []
        """Those for whom checksums are being compared, which comes before the recount."""
        self._to_compare: list[Asked] = []
        self._differences: list[str] = []
        """What the last recount has found."""
        self._open: Counter[SessionId] = Counter()
        """How many of all these are a client's."""
        self._tries = 0

    @property
    def is_walking(self) -> bool:
        """Whether there is a step to do."""
        return self._recount.is_walking or self._count.is_walking

    def walk_some(self) -> None:
        """Do one step of each walk that is under way."""
        self._recount.step()
        self._count.step()

    def _recounted(self, given: list[Asked], found: list[str] | Exception) -> None:
        """A report is taken for all who wait for it."""
        if isinstance(found, Exception):
            fault = _fault(found)
            for asked in given:
                self._answer(asked, fault)
            return
        self._differences = found
        self._waiting += given
        self._take()

    def _compare_checksums(self) -> None:
        """For all who wait for that, unless it is under way."""
        if self._to_compare and not self._comparing:
            self._comparing, self._to_compare = self._to_compare, []
            audit.Checksums(self._cache, self._store, self._compared)

    def _compared(self, found: Compared) -> None:
        given, self._comparing = self._comparing, []
        for asked in given:
            self._recount.ask(asked._replace(compared=found))
        self._compare_checksums()

    def _begin_count(self) -> Generator[None, None, Holders]:
        # With the walk's first step, so that it knows who came after it was asked for.
        stopped = self._stopped.look(self._cache.sessions.values())
        return (yield from holders.take(self._cache, self._store, stopped, time.monotonic()))

    def _counted(self, given: list[Asked], found: Holders | Exception) -> None:
        for asked in given:
            if isinstance(found, Exception):
                self._answer(asked, _fault(found))
            else:
                whose = None if asked.tenant is None else asked.tenant.name
                self._answer(asked, Reported(found.report(whose)))

    def answer(self, incoming: Incoming) -> None:
        """Answer now, or when the operating system has been asked. A fault of ours is an answer,
        too: reports change nothing."""
        session, correlation, message = incoming
        now = time.monotonic()
        try:
            tenant = self.whose(session)
            match message:
                case ListSequences():
                    report = {"sequences": report_of_sequences(self._cache, now, tenant)}
                case ListPins():
                    report = {"pins": report_of_pins(self._cache, now, tenant)}
                case _:
                    give = partial(self._reply, session, correlation)
                    self._wait(Asked(incoming, tenant, give))
                    self._take()
                    return
        except KvdError as error:
            self._reply(session, correlation, error)
        except Exception as error:
            self._reply(session, correlation, _fault(error))
        else:
            self._reply(session, correlation, Reported(report))

    def ask_status(self, give: Callable[[Any], None]) -> None:
        """Give the status of everything to this process itself, soon: a Reported, or an
        InternalError."""
        self._wait(Asked(Incoming(_OURSELVES, 0, Status()), None, give))
        self._take()

    def whose(self, asker: SessionId) -> Tenant | None:
        """The tenant of which this client may see what there is; None: of all."""
        if not self._has_tenants:
            return None
        session = self._cache.sessions.get(asker)
        if session is None:
            raise UnknownSession("this daemon has tenants: only a session is told about them")
        return None if session.administrator else session.tenant

    def _wait(self, asked: Asked) -> None:
        """Take it in; what it asks is answered later."""
        session, _, message = asked.incoming
        if isinstance(message, Verify) and asked.tenant is not None:
            raise Forbidden("to verify everything is for the daemon's own user and root")
        if self._open[session] >= MAX_WAITING:
            raise TooMany("this client waits for as many reports as it may", most=MAX_WAITING)
        self._open[session] += 1
        match message:
            case Verify(checksums=1):
                self._to_compare.append(asked)
                self._compare_checksums()
            case Verify():
                self._recount.ask(asked)
            case ListClients():
                self._count.ask(asked)
            case _:
                self._waiting.append(asked)

    def _take(self) -> None:
        """Take a report for all who wait, unless one is being taken."""
        if self._asked or not self._waiting:
            return
        self._asked, self._waiting = self._waiting, []
        self._tries += 1
        thorough = any(isinstance(asked.incoming.message, Verify) for asked in self._asked)
        tenants = {asked.tenant for asked in self._asked}
        uptime = time.monotonic() - self._started
        try:
            taken = reports.take(
                self._cache,
                self._store,
                self._instance,
                uptime,
                tenants,
                self._differences if thorough else None,
            )
        except Exception as error:
            self._fail(error)
        else:
            look = partial(reports.look, taken, undoing=thorough)
            self._store.ask(look, partial(self._looked, taken, self._store.refusals))

    def _looked(
        self, taken: reports.Taken, refusals: int, seen: reports.Seen | None, error: Any
    ) -> None:
        if seen is None:
            self._fail(error)
        elif self._store.refusals != refusals and self._tries < TRIES:
            self._waiting = self._asked + self._waiting
            self._asked = []
            self._take()
        else:
            self._stopped.note(self._cache.sessions.values(), seen.stopped)
            self._give(partial(_report, taken, seen))

    def _fail(self, error: Exception) -> None:
        fault = _fault(error)
        self._give(lambda _: fault)

    def _give(self, body_for: Callable[[Asked], Any]) -> None:
        """Answer all whose report was taken, and begin with that of those who came meanwhile."""
        given, self._asked = self._asked, []
        self._tries = 0
        for asked in given:
            self._answer(asked, body_for(asked))
        self._take()

    def _answer(self, asked: Asked, body: Any) -> None:
        session = asked.incoming.session
        self._open[session] -= 1
        if not self._open[session]:
            del self._open[session]
        asked.give(body)


def _report(taken: reports.Taken, seen: reports.Seen, asked: Asked) -> Reported:
    if isinstance(asked.incoming.message, Verify):
        return Reported(reports.verify(taken, seen, asked.compared))
    whose = None if asked.tenant is None else asked.tenant.name
    return Reported(reports.status(taken, seen, whose))


def _fault(error: Exception) -> InternalError:
    log.error("report failed", error)
    return InternalError(f"{type(error).__name__}: {error}")
