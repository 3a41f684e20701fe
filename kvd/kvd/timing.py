"""How long requests take, from when the loop takes one in to its answer, and which errors are
answered. Counted all the time, since it costs less than a microsecond of a request.

Covers whatever is answered later, too: an alloc that waits for an id, an append that waits for
memory, a report. Does not cover what a client waits before the loop gets to its request.
"""

import re
from time import perf_counter
from typing import Any, NamedTuple

from kvd.core.events import SessionId
from kvd.core.histogram import Histogram
from kvd_proto.errors import BY_CODE, KvdError
from kvd_proto.messages import OPERATIONS

BOUNDS = (
    *(0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5),
    *(0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10),
)
"""Seconds. A request without waiting takes some 50 us."""
INVALID = "invalid"
"""The operation of what could not be decoded."""


class _Begun(NamedTuple):
    durations: Histogram
    since: float


class RequestTimes:
    """The loop's alone. `durations` is by operation, `errors` by their code."""

    def __init__(self) -> None:
        self.durations = {name: Histogram(BOUNDS) for name in (*_NAMES.values(), INVALID)}
        self.errors = dict.fromkeys(BY_CODE, 0)
        self._by_kind = {kind: self.durations[name] for kind, name in _NAMES.items()}
        # The one that is being served: most are answered before the next.
        self._session: SessionId = b""
        self._correlation = 0
        self._kind: type[Any] | None = None
        """None: it is answered."""
        self._since = 0.0
        self._later: dict[SessionId, dict[int, _Begun]] = {}
        """Those that were not answered at once."""

    def begin(self, session: SessionId, correlation: int, message: Any) -> None:
        """A request is served from now on. Who asked waits for what is done here."""
        self._session = session
        self._correlation = correlation
        self._kind = type(message)
        self._since = perf_counter()

    def finish(self) -> None:
        """It has been served; if it is not answered yet, it will be later."""
        if self._kind is not None:
            begun = _Begun(self._durations_of(self._kind), self._since)
            self._later.setdefault(self._session, {})[self._correlation] = begun
            self._kind = None

    def answered(self, session: SessionId, correlation: int, body: Any) -> None:
        """A request has been sent its answer."""
        now = perf_counter()
        if isinstance(body, KvdError):
            self.errors[body.code] += 1
        if self._kind is not None and correlation == self._correlation and session == self._session:
            self._durations_of(self._kind).observe(now - self._since)
            self._kind = None
            return
        waiting = self._later.get(session)
        begun = waiting.pop(correlation, None) if waiting else None
        if begun is not None:
            begun.durations.observe(now - begun.since)
            if not waiting:
                del self._later[session]

    def _durations_of(self, kind: type[Any]) -> Histogram:
        return self._by_kind.get(kind) or self.durations[INVALID]

    def forget(self, session: SessionId) -> None:
        """It has ended: what it waited for is not answered any more."""
        self._later.pop(session, None)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


_NAMES = {operation.request: _snake(operation.request.__name__) for operation in OPERATIONS}
