"""One thread that answers GET over HTTP/1.1, and whom nobody can hold up or fill up.

Covers connections and their bounds. What is answered: the `handle` that it is given.

    accepted ──► reading ──whole head──► waiting ──respond──► writing ──► closing ──► gone
                    └──────── too slow, too long, nonsense ─────┘

Every state has a deadline, a head has a length, there are so many connections, and so many new ones
a second; a flood waits in the kernel. When all are taken, the one goes that has waited longest for
its client to say something. Each answer ends its connection. TCP is loopback alone, but a browser
can be led there from anywhere: so a Host that is a name, but "localhost", is refused, and no other
origin may read.
"""

import ipaddress
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NamedTuple

from kvd import descriptors, log
from kvd.metrics.listening import Listener

MAX_CONNECTIONS = 32
MAX_HEAD_BYTES = 8 << 10
MAX_IGNORED_BYTES = 64 << 10
ACCEPTED_A_SECOND = 50
READ_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""Whoever answers says earlier that it cannot."""
WRITE_SECONDS = 10.0
CLOSE_SECONDS = 1.0
STOP_SECONDS = 2.0
TEXT = "text/plain; charset=utf-8"


class Response(NamedTuple):
    """What is answered."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    headers: tuple[str, ...] = ()


Respond = Callable[[Response], None]
Handle = Callable[[str, Respond], None]
"""Called in the server's thread with a path; calls `respond` once, at once or later, there."""


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    deadline: float
    is_local: bool
    """It came over a Unix socket."""
    head: bytearray = field(default_factory=bytearray)
    is_reading: bool = True
    is_closing: bool = False
    ignored: int = 0
    """Bytes that came after the head."""
    without_body: bool = False
    left: memoryview = field(default_factory=lambda: memoryview(b""))


class HttpServer:
    """Serves `listeners`, which it closes at its end, in a thread of its own from `start` on.

    `tick` is called in that thread, with the time, whenever something has happened, and when what
    it returned last is due.
    """

    def __init__(
        self,
        listeners: Iterable[Listener],
        handle: Handle,
        tick: Callable[[float], float],
    ) -> None:
        self._handle = handle
        self._tick = tick
        self._listeners = list(listeners)
        self._connections: dict[_Connection, None] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._stopping = False
        self._allowed = float(ACCEPTED_A_SECOND)
        self._allowed_at = time.monotonic()
        self._is_accepting = False
        for listener in self._listeners:
            listener.sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvd-metrics", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have something called in the server's thread. From any thread."""
        self._posted.append(call)
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Stop serving, and close everything."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        for connection in list(self._connections):
            self._drop(connection)
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        os.close(self._wake_fd)

    # --- the thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread's
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # of ours; the daemon can do without metrics
                log.error("metrics failed", error)
                for connection in list(self._connections):
                    self._drop(connection)
                time.sleep(1)

    def _turn(self) -> None:
        now = time.monotonic()
        due = min(self._tick(now), self._expire(now), self._admit(now))
        for key, mask in self._selector.select(max(0.0, due - now)):
            if isinstance(key.data, Listener):
                self._accept(key.data.sock)
            elif key.data in self._connections:
                self._go_on(key.data, mask)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._posted:
            self._posted.popleft()()

    def _admit(self, now: float) -> float:
        """Listen, or not for a moment; returns when this may change."""
        self._allowed += (now - self._allowed_at) * ACCEPTED_A_SECOND
        self._allowed = min(self._allowed, float(ACCEPTED_A_SECOND))
        self._allowed_at = now
        may = self._allowed >= 1
        if may != self._is_accepting:
            self._is_accepting = may
            for listener in self._listeners:
                if may:
                    self._selector.register(listener.sock, selectors.EVENT_READ, listener)
                else:
                    self._selector.unregister(listener.sock)
        return float("inf") if may else now + (1 - self._allowed) / ACCEPTED_A_SECOND

    def _accept(self, listener: socket.socket) -> None:
        self._allowed -= 1
        try:
            sock, _ = listener.accept()
        except OSError:  # it has gone again, or there is no descriptor
            return
        if descriptors.are_short():
            sock.close()
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(self._least_wanted())
        sock.setblocking(False)
        deadline = time.monotonic() + READ_SECONDS
        connection = _Connection(sock, deadline, listener.family == socket.AF_UNIX)
        self._connections[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _least_wanted(self) -> _Connection:
        oldest_first = list(self._connections)
        silent = (each for each in oldest_first if each.is_reading or each.is_closing)
        return next(silent, oldest_first[0])

    def _expire(self, now: float) -> float:
        """Drop who took too long; returns when the next one has."""
        for connection in list(self._connections):
            if connection.deadline <= now:
                self._drop(connection)
        return min((each.deadline for each in self._connections), default=float("inf"))

    # --- one connection

    def _go_on(self, connection: _Connection, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write(connection)
            elif connection.is_reading:
                self._read(connection)
            else:
                self._ignore(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    def _read(self, connection: _Connection) -> None:
        got = connection.sock.recv(MAX_HEAD_BYTES)
        if not got:
            self._drop(connection)
            return
        connection.head += got
        end = connection.head.find(b"\r\n\r\n")
        if end < 0 and len(connection.head) <= MAX_HEAD_BYTES:
            return
        connection.is_reading = False
        connection.deadline = time.monotonic() + ANSWER_SECONDS
        if not 0 <= end <= MAX_HEAD_BYTES:
            refusal = _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too long")
            self._respond(connection, refusal)
            return
        asked = _parse(bytes(connection.head[:end]), is_local=connection.is_local)
        if isinstance(asked, Response):
            self._respond(connection, asked)
            return
        connection.without_body = asked.without_body
        self._handle(asked.path, lambda response: self._respond(connection, response))

    def _ignore(self, connection: _Connection) -> None:
        """What comes after the head is nothing to us, but its end is; and no more than so much."""
        n_bytes = len(connection.sock.recv(MAX_HEAD_BYTES))
        connection.ignored += n_bytes
        if not n_bytes or connection.ignored > MAX_IGNORED_BYTES:
            self._drop(connection)

    def _respond(self, connection: _Connection, response: Response) -> None:
        if connection not in self._connections:
            return
        head = [
            f"HTTP/1.1 {response.status.value} {response.status.phrase}",
            f"Content-Type: {response.content_type}",
            f"Content-Length: {len(response.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
            *response.headers,
        ]
        body = b"" if connection.without_body else response.body
        connection.left = memoryview("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        connection.deadline = time.monotonic() + WRITE_SECONDS
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(connection.sock, both, connection)

    def _write(self, connection: _Connection) -> None:
        connection.left = connection.left[connection.sock.send(connection.left) :]
        if not connection.left:
            # Closing at once would destroy what was sent, if the client has sent more meanwhile.
            connection.sock.shutdown(socket.SHUT_WR)
            connection.is_closing = True
            connection.deadline = time.monotonic() + CLOSE_SECONDS
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        with suppress(KeyError):
            self._selector.unregister(connection.sock)
        connection.sock.close()


class _Asked(NamedTuple):
    path: str
    without_body: bool


def _parse(head: bytes, *, is_local: bool) -> _Asked | Response:
    """What a head asks, or why that is refused."""
    line, *fields = head.decode("latin-1").split("\r\n")
    match line.split(" "):
        case [method, target, "HTTP/1.0" | "HTTP/1.1"] if target.startswith("/"):
            pass
        case _:
            return _plain(HTTPStatus.BAD_REQUEST, "this is not an HTTP request")
    if method not in ("GET", "HEAD"):
        refusal = _plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        return refusal._replace(headers=("Allow: GET, HEAD",))
    if not is_local:
        for each in fields:
            name, _, value = each.partition(":")
            if name.strip().lower() == "host" and not _is_loopback(value.strip()):
                return _plain(HTTPStatus.MISDIRECTED_REQUEST, "ask for localhost, or its address")
    return _Asked(target.partition("?")[0], method == "HEAD")


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _plain(status: HTTPStatus, text: str) -> Response:
    return Response(status, f"{text}\n".encode())
