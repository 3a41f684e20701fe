"""Who asked for a report, and when it is given.

Covers requests for status, verify and lists, and their order. What a report says: reports.py.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kvd import log, reports
from kvd.core.accounting import report_of_sequences
from kvd.core.cache import Cache
from kvd.core.events import SessionId
from kvd.requests import Incoming
from kvd.stopped import StoppedClients
from kvd.store import Store
from kvd_proto.errors import InternalError
from kvd_proto.messages import ListClients, ListSequences, Reported, Status, Verify

REPORTS = frozenset((Status, Verify, ListSequences, ListClients))
"""The requests that are answered here."""
TRIES = 5
"""How often a report is taken, if each time the system refuses memory in between."""


class Reporter:
    """Answers requests for reports. All who ask for one of the memory while another is being taken
    share the next one, so many who ask at once are no burden."""

    def __init__(
        self,
        cache: Cache,
        store: Store,
        instance: str,
        reply: Callable[[SessionId, int, Any], None],
    ) -> None:
        self._cache = cache
        self._store = store
        self._instance = instance
        self._reply = reply
        self._started = time.monotonic()
        self._stopped = StoppedClients()
        self._waiting: list[Incoming] = []
        self._asked: list[Incoming] = []
        """Those whose report is being taken."""
        self._tries = 0

    def answer(self, incoming: Incoming) -> None:
        """Answer now, or when the operating system has been asked. A fault of ours is an answer,
        too: reports change nothing."""
        session, correlation, message = incoming
        try:
            match message:
                case ListSequences():
                    report = {"sequences": report_of_sequences(self._cache, time.monotonic())}
                case ListClients():
                    stopped = self._stopped.look(self._cache.sessions.values())
                    report = reports.clients(self._cache, stopped, time.monotonic())
                case _:
                    self._waiting.append(incoming)
                    self._take()
                    return
        except Exception as error:
            self._reply(session, correlation, _fault(error))
        else:
            self._reply(session, correlation, Reported(report))

    def _take(self) -> None:
        """Take a report for all who wait, unless one is being taken."""
        if self._asked or not self._waiting:
            return
        self._asked, self._waiting = self._waiting, []
        self._tries += 1
        thorough = any(isinstance(incoming.message, Verify) for incoming in self._asked)
        uptime = time.monotonic() - self._started
        try:
            stopped = self._stopped.look(self._cache.sessions.values())
            taken = reports.take(
                self._cache, self._store, self._instance, uptime, stopped, recounting=thorough
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
            self._give(
                {
                    Status: Reported(reports.status(taken, seen)),
                    Verify: Reported(reports.verify(taken, seen)),
                }
            )

    def _fail(self, error: Exception) -> None:
        fault = _fault(error)
        self._give({Status: fault, Verify: fault})

    def _give(self, bodies: dict[type[Any], Any]) -> None:
        """Answer all whose report was taken, and begin with that of those who came meanwhile."""
        asked, self._asked = self._asked, []
        self._tries = 0
        for session, correlation, message in asked:
            self._reply(session, correlation, bodies[type(message)])
        self._take()


def _fault(error: Exception) -> InternalError:
    log.error("report failed", error)
    return InternalError(f"{type(error).__name__}: {error}")
