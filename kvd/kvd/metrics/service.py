"""Which path answers what, and how old an answer may be. In the HTTP server's thread, but for
`answer`, which is the loop's part.

The loop is asked one thing at a time: all who come meanwhile share the answer, and a snapshot is
good for FRESH_SECONDS. So many who ask, or one who never stops, cost the loop a few snapshots a
second.
"""

import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from kvd import log
from kvd.metrics import history, page
from kvd.metrics.exposition import CONTENT_TYPE, write
from kvd.metrics.history import History
from kvd.metrics.http import HttpServer, Respond, Response
from kvd.metrics.listening import Listener
from kvd.metrics.questions import Kind, Questions
from kvd.metrics.snapshot import Snapshot

FRESH_SECONDS = 0.25
SNAPSHOT_SECONDS = 5.0
"""So long a snapshot is waited for: a long recount, or a full copier, may be before it."""
HEALTH_SECONDS = 1.0
JSON = "application/json"


class _Waiting(NamedTuple):
    deadline: float
    respond: Respond
    then: Callable[[], Response]


class Metrics:
    """The HTTP side of the daemon. `questions` is what the loop answers."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        """Takes over the listening sockets. `start` begins."""
        self.questions = Questions()
        self._server = HttpServer(listeners, self._handle, self._tick)
        self._history = History()
        self._next_sample = 0.0
        self._latest: Snapshot | None = None
        self._latest_at = 0.0
        self._text: bytes | None = None
        """The latest snapshot, written."""
        self._waiting: dict[Kind, list[_Waiting]] = {kind: [] for kind in Kind}
        self._asked: set[Kind] = set()

    def start(self) -> None:
        """Serve from now on; the loop need not run yet."""
        self._server.start()

    def close(self) -> None:
        """End the thread. The loop answers nothing any more."""
        self._server.close()
        self.questions.close()

    # --- in the thread

    def _handle(self, path: str, respond: Respond) -> None:
        match path:
            case "/":
                respond(page.RESPONSE)
            case "/metrics":
                self._with_snapshot(respond, self._metrics)
            case "/history.json":
                self._with_snapshot(respond, self._history_json)
            case "/healthz":
                self._wait(Kind.ARE_YOU_THERE, HEALTH_SECONDS, respond, _healthy)
            case _:
                known = "there are /, /metrics, /history.json and /healthz\n"
                respond(Response(HTTPStatus.NOT_FOUND, known.encode()))

    def _with_snapshot(self, respond: Respond, then: Callable[[], Response]) -> None:
        if self._latest is not None and time.monotonic() < self._latest_at + FRESH_SECONDS:
            respond(_made(then))
        else:
            self._wait(Kind.HOW_ARE_THINGS, SNAPSHOT_SECONDS, respond, then)

    def _wait(
        self, kind: Kind, seconds: float, respond: Respond, then: Callable[[], Response]
    ) -> None:
        self._waiting[kind].append(_Waiting(time.monotonic() + seconds, respond, then))
        self._ask(kind)

    def _ask(self, kind: Kind) -> None:
        if kind not in self._asked:
            self._asked.add(kind)
            give = partial(self._give, kind)
            self.questions.ask(kind, give)

    def _give(self, kind: Kind, answer: object) -> None:
        """In the loop's thread."""
        self._server.post(partial(self._answered, kind, answer))

    def _answered(self, kind: Kind, answer: object) -> None:
        self._asked.discard(kind)
        waiting, self._waiting[kind] = self._waiting[kind], []
        if isinstance(answer, Snapshot):
            self._latest, self._latest_at, self._text = answer, time.monotonic(), None
        for each in waiting:
            each.respond(_fault(answer) if isinstance(answer, Exception) else _made(each.then))

    def _tick(self, now: float) -> float:
        """Give up what was not answered in time, and take a sample if one is due."""
        if now >= self._next_sample:
            self._next_sample = now + history.SAMPLE_SECONDS
            self._wait(Kind.HOW_ARE_THINGS, SNAPSHOT_SECONDS, _nobody, self._sample)
        due = self._next_sample
        for kind, waiting in self._waiting.items():
            late = [each for each in waiting if each.deadline <= now]
            if late:
                self._waiting[kind] = [each for each in waiting if each.deadline > now]
                for each in late:
                    each.respond(_too_late(kind))
            due = min([due, *(each.deadline for each in self._waiting[kind])])
        return due

    # --- what is answered

    def _metrics(self) -> Response:
        assert self._latest is not None
        if self._text is None:
            self._text = write(self._latest)
        return Response(HTTPStatus.OK, self._text, CONTENT_TYPE)

    def _history_json(self) -> Response:
        assert self._latest is not None
        found = {
            **self._history.columns(),
            "status": self._latest.report,
            "sequences": self._latest.sequences,
        }
        return Response(HTTPStatus.OK, json.dumps(found, separators=(",", ":")).encode(), JSON)

    def _sample(self) -> Response:
        assert self._latest is not None
        self._history.add(self._latest, time.time())
        return Response(HTTPStatus.OK, b"")


def _nobody(response: Response) -> None:
    """Takes the answer to our own question."""


def _healthy() -> Response:
    return Response(HTTPStatus.OK, b"ok\n")


def _made(then: Callable[[], Response]) -> Response:
    """An answer, also if there is a fault of ours in making it."""
    try:
        return then()
    except Exception as error:
        log.error("metrics failed", error)
        return _fault(error)


def _too_late(kind: Kind) -> Response:
    seconds = HEALTH_SECONDS if kind is Kind.ARE_YOU_THERE else SNAPSHOT_SECONDS
    text = f"the serving loop has not answered within {seconds:g} s\n"
    return Response(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())


def _fault(error: Exception) -> Response:
    text = f"{type(error).__name__}: {error}\n"
    return Response(HTTPStatus.INTERNAL_SERVER_ERROR, text.encode())
