"""Sessions: who is connected, through which lifeline, with which descriptors.

Covers the handshake, descriptors that are sent, and the notice of death: the end of the lifeline
or of the process, whichever comes first. What a session's end gives back: kvd.core.
"""

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd import log
from kvd.core.events import Connected, Disconnected, Event, SessionId
from kvd.lifeline import DatagramTooLong, Listener, Peer, PeerGone, SendQueueFull
from kvd.staging import HEADER_BYTES
from kvd.store import Store
from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import BadMessage, KvdError, UnsupportedVersion
from kvd_proto.geometry import round_up
from kvd_proto.messages import Hello, Refused, SegmentShared, Welcome

MAX_HELLO_BYTES = 4096
MAX_STAGING_BYTES = 1 << 40
HANDSHAKE_SECONDS = 5.0
TENANT = "default"
"""Every client of the one user that may connect is of one tenant."""


@dataclass(slots=True, eq=False)
class Connection:
    """A lifeline, and its session once it has said hello."""

    peer: Peer
    since: float
    session: SessionId = b""


Watch = Callable[[int, int, Callable[[int], None]], None]


class Sessions:
    """All lifelines of the daemon."""

    def __init__(
        self,
        path: Path,
        instance: str,
        store: Store,
        handle: Callable[[Event], None],
        watch: Watch,
        unwatch: Callable[[int], None],
    ) -> None:
        """Listen at `path`. `handle` takes the core's events; `watch` and `unwatch` are the
        loop's."""
        self._instance = instance
        self._store = store
        self._handle = handle
        self._watch = watch
        self._unwatch = unwatch
        self._epoch = os.urandom(16)
        self._greeting: dict[Connection, None] = {}
        self._by_session: dict[SessionId, Connection] = {}
        self._listener = Listener(str(path))
        watch(self._listener.fd, select.EPOLLIN, lambda _: self._accept())

    # --- what the core asks for

    def welcome(self, session: SessionId, n_bytes: int) -> None:
        """Make the staging and tell the client its session."""
        connection = self._by_session[session]
        fds: list[int] = []
        try:
            if n_bytes:
                fds.append(self._store.open_staging(session, n_bytes).fd)
        except KvdError as error:
            self.refuse(session, error)
            return
        message = Welcome(PROTOCOL_VERSION, session, self._epoch, self._instance, n_bytes)
        self._send(connection, codec.encode_datagram(message), fds)
        log.info("client connected", session=session.hex()[:8], pid=connection.peer.pid)

    def refuse(self, session: SessionId, error: KvdError) -> None:
        """Tell a client why it gets no session, and let it go."""
        self._refuse(self._by_session[session], error)

    def share(self, session: SessionId, arena: int) -> None:
        """Send the arena's read-only descriptor."""
        stored = self._store.arenas[arena]
        fd = stored.segment.read_only_fd()
        try:
            message = SegmentShared(arena, stored.segment.size)
            self._send(self._by_session[session], codec.encode_datagram(message), [fd])
        finally:
            os.close(fd)

    # --- what happens

    def next_deadline(self) -> float | None:
        """When the oldest handshake must be over."""
        first = next(iter(self._greeting), None)
        return None if first is None else first.since + HANDSHAKE_SECONDS

    def expire_handshakes(self, now: float) -> None:
        """Let go of those who connected and said nothing."""
        for connection in list(self._greeting):
            if now < connection.since + HANDSHAKE_SECONDS:
                return
            log.warning("no hello", pid=connection.peer.pid)
            self._end(connection)

    def close(self) -> None:
        """Close all lifelines: every client knows at once."""
        for connection in [*self._by_session.values(), *self._greeting]:
            self._drop(connection)
        self._unwatch(self._listener.fd)
        self._listener.close()

    def _accept(self) -> None:
        peer = self._listener.accept()
        if peer is None:
            return
        connection = Connection(peer, time.monotonic())
        self._greeting[connection] = None
        self._watch(peer.fd, select.EPOLLIN, lambda mask: self._lifeline(connection, mask))
        self._watch(peer.pidfd, select.EPOLLIN, lambda _: self._end(connection))

    def _lifeline(self, connection: Connection, mask: int) -> None:
        """Something happened on a lifeline: its hello, room to send, or its end."""
        try:
            if mask & select.EPOLLOUT:
                self._flush(connection)
            if not mask & ~select.EPOLLOUT:
                return
            datagram = connection.peer.recv(MAX_HELLO_BYTES)
        except PeerGone:
            self._end(connection)
        except DatagramTooLong as error:
            self._refuse(connection, BadMessage(str(error)))
        else:
            if datagram is not None:
                self._hello(connection, datagram)

    def _hello(self, connection: Connection, datagram: bytes) -> None:
        try:
            hello = codec.decode_datagram(datagram)
            if connection.session or not isinstance(hello, Hello):
                raise BadMessage("a client says hello, once, and nothing else")
            if hello.version != PROTOCOL_VERSION:
                raise UnsupportedVersion(
                    "the daemon speaks another protocol version",
                    daemon=PROTOCOL_VERSION,
                    client=hello.version,
                )
            if hello.staging_bytes > MAX_STAGING_BYTES:
                raise BadMessage("so much staging cannot be", staging_bytes=hello.staging_bytes)
        except KvdError as error:
            self._refuse(connection, error)
            return
        del self._greeting[connection]
        # ZeroMQ's own routing ids begin with a zero byte; ours never do.
        connection.session = b"\x01" + os.urandom(15)
        self._by_session[connection.session] = connection
        n_bytes = round_up(hello.staging_bytes) + HEADER_BYTES if hello.staging_bytes else 0
        peer = connection.peer
        self._handle(
            Connected(connection.session, hello.client, peer.pid, peer.uid, TENANT, n_bytes)
        )

    def _refuse(self, connection: Connection, error: KvdError) -> None:
        message = Refused(error.code, error.message, error.details)
        self._send(connection, codec.encode_datagram(message), [])
        self._end(connection)

    def _send(self, connection: Connection, datagram: bytes, fds: list[int]) -> None:
        try:
            connection.peer.send(datagram, fds)
            self._watch_for(connection)
        except (PeerGone, SendQueueFull, OSError) as error:
            # It dies, or does not read: the poll loop sees the end of a lifeline that is shut down.
            log.warning("lifeline lost", pid=connection.peer.pid, reason=str(error))
            connection.peer.shut_down()

    def _flush(self, connection: Connection) -> None:
        connection.peer.flush()
        self._watch_for(connection)

    def _watch_for(self, connection: Connection) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if connection.peer.wants_write else 0)
        self._watch(connection.peer.fd, mask, lambda got: self._lifeline(connection, got))

    def _end(self, connection: Connection) -> None:
        """The client is gone: what its session held is given back."""
        self._drop(connection)
        if connection.session:
            log.info("client gone", session=connection.session.hex()[:8], pid=connection.peer.pid)
            self._handle(Disconnected(connection.session))

    def _drop(self, connection: Connection) -> None:
        self._greeting.pop(connection, None)
        self._by_session.pop(connection.session, None)
        self._unwatch(connection.peer.fd)
        self._unwatch(connection.peer.pidfd)
        connection.peer.close()
