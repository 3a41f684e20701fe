"""Sessions: who is connected, through which lifeline, with which descriptors.

Covers the handshake, descriptors that are sent, and the notice of death: the end of the lifeline
or of the process, whichever comes first. What a session's end gives back: kvd.core.
"""

import math
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvd import descriptors, log
from kvd.core.events import Connected, Disconnected, Event, SessionId, TurnedAway
from kvd.lifeline import DatagramTooLong, Listener, Peer, PeerGone, SendQueueFull
from kvd.staging import HEADER_BYTES
from kvd.stopped import is_ending
from kvd.store import Store
from kvd.tenants import Tenants
from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import BadMessage, InternalError, KvdError, UnsupportedVersion
from kvd_proto.geometry import PAGE_BYTES, round_up
from kvd_proto.messages import Hello, Refused, SegmentShared, Welcome

MAX_HELLO_BYTES = 4096
MAX_STAGING_BYTES = 1 << 40
HANDSHAKE_SECONDS = 5.0
MAX_GREETING = 64
"""Connections that have not said hello. Clients do so at once, so when there are more, the oldest
one goes: connecting and saying nothing cannot use up the descriptors."""


@dataclass(slots=True, eq=False)
class Connection:
    """A lifeline, and its session once it has said hello. `mask` is what the loop watches for."""

    peer: Peer
    since: float
    session: SessionId = b""
    mask: int = 0
    fault: str = ""
    """Why we have shut it down, if we have."""


Watch = Callable[[int, int, Callable[[int], None]], None]


class Sessions:
    """All lifelines of the daemon."""

    def __init__(
        self,
        path: Path,
        group: int | None,
        instance: str,
        store: Store,
        tenants: Tenants,
        handle: Callable[[Event], None],
        watch: Watch,
        unwatch: Callable[[int], None],
    ) -> None:
        """Listen at `path` for this user and `group`; raises as Listener. `handle` takes the core's
        events; `watch` and `unwatch` are the loop's. `tenants` may be replaced: that is for those
        who connect from then on."""
        self._instance = instance
        self._store = store
        self.tenants = tenants
        self._handle = handle
        self._watch = watch
        self._unwatch = unwatch
        self._epoch = os.urandom(16)
        self._greeting: dict[Connection, None] = {}
        self._by_session: dict[SessionId, Connection] = {}
        self._listener = Listener(str(path), group=group, are_short=descriptors.are_short)
        watch(self._listener.fd, select.EPOLLIN, lambda _: self._accept())

    # --- what the core asks for

    def open(self, session: SessionId, n_bytes: int) -> None:
        """Have the staging made, if it is to have one, and then tell the client its session."""
        if n_bytes:
            self._store.open_staging(session, n_bytes, partial(self._opened, session, n_bytes))
        else:
            self._opened(session, n_bytes, None)

    def refuse(self, session: SessionId, error: KvdError) -> None:
        """Tell a client why it gets no session, and let it go."""
        self._refuse(self._by_session[session], error)

    def share(self, session: SessionId, arena: int) -> None:
        """Send read-only descriptors of the arena and of its index."""
        stored = self._store.arenas[arena]
        message = SegmentShared(arena, stored.segment.size)
        connection = self._by_session[session]
        fds: list[int] = []
        try:
            fds.append(stored.open_reader())
            fds.append(stored.index.open_reader())
            self._send(connection, codec.encode_datagram(message), fds)
        except OSError as error:  # too many descriptors are open
            log.warning("arena not shared", pid=connection.peer.pid, reason=error)
            self._shut_down(connection, "descriptors")
        finally:
            for fd in fds:
                os.close(fd)

    def give_up(self, session: SessionId) -> None:
        """A reply to this client is lost: end its session, before it goes on without knowing. A
        session that does not exist is ignored."""
        connection = self._by_session.get(session)
        if connection is not None:
            log.warning("client does not read its replies", pid=connection.peer.pid)
            self._shut_down(connection, "unread replies")

    # --- what happens

    def expire_handshakes(self, now: float) -> float:
        """Let go of those who connected and said nothing; returns when the next one is due."""
        for connection in list(self._greeting):
            due = connection.since + HANDSHAKE_SECONDS
            if now < due:
                return due
            self._expire(connection)
        return math.inf

    def close(self) -> None:
        """Close all lifelines: every client knows at once."""
        for connection in [*self._by_session.values(), *self._greeting]:
            self._drop(connection)
        self._unwatch(self._listener.fd)
        self._listener.close()

    def _accept(self) -> None:
        refused = self._listener.refused
        peer = self._listener.accept()
        if peer is None:
            if self._listener.refused > refused:
                log.warning("connection refused", reason="no descriptor for it, or it was gone")
            return
        connection = Connection(peer, time.monotonic())
        self._greeting[connection] = None
        self._watch_lifeline(connection)
        self._watch(peer.pidfd, select.EPOLLIN, lambda _: self._end(connection))
        if len(self._greeting) > MAX_GREETING:
            self._expire(next(iter(self._greeting)))

    def _expire(self, connection: Connection) -> None:
        log.warning("no hello", pid=connection.peer.pid)
        self._end(connection)

    def _lifeline(self, connection: Connection, mask: int) -> None:
        """Something happened on a lifeline: its hello, room to send, or its end."""
        try:
            if mask & select.EPOLLOUT:
                connection.peer.flush()
                self._watch_lifeline(connection)
            if not mask & ~select.EPOLLOUT:
                return
            datagram = connection.peer.recv(MAX_HELLO_BYTES)
        except DatagramTooLong as error:
            self._refuse(connection, BadMessage(str(error)))
        except (PeerGone, OSError):
            self._end(connection)
        else:
            if datagram is not None:
                self._hello(connection, datagram)

    def _hello(self, connection: Connection, datagram: bytes) -> None:
        name = ""
        try:
            hello = codec.decode_datagram(datagram)
            if connection.session or not isinstance(hello, Hello):
                raise BadMessage("a client says hello, once, and nothing else")
            name = hello.client
            if hello.version != PROTOCOL_VERSION:
                raise UnsupportedVersion(
                    "the daemon speaks another protocol version",
                    daemon=PROTOCOL_VERSION,
                    client=hello.version,
                )
            if hello.staging_bytes > MAX_STAGING_BYTES:
                raise BadMessage("so much staging cannot be", staging_bytes=hello.staging_bytes)
            peer = connection.peer
            member = self.tenants.find(peer.uid, peer.groups)
        except KvdError as error:
            self._turn_away(connection, name, error)
            return
        except OSError as error:
            fault = InternalError(f"your groups cannot be looked up: {error}")
            self._turn_away(connection, name, fault)
            return
        del self._greeting[connection]
        # ZeroMQ's own routing ids begin with a zero byte; ours never do.
        connection.session = b"\x01" + os.urandom(15)
        self._by_session[connection.session] = connection
        granted = min(round_up(hello.staging_bytes), member.max_staging // PAGE_BYTES * PAGE_BYTES)
        n_bytes = granted + HEADER_BYTES if granted else 0
        self._handle(
            Connected(
                connection.session,
                hello.client,
                peer.pid,
                peer.uid,
                member.tenant,
                n_bytes,
                member.administrator,
            )
        )

    def _turn_away(self, connection: Connection, client: str, error: KvdError) -> None:
        self._handle(TurnedAway(client, connection.peer.pid, connection.peer.uid, error))
        self._refuse(connection, error)

    def _opened(self, session: SessionId, n_bytes: int, error: KvdError | None) -> None:
        """The staging is there, or could not be made; the client may have gone meanwhile."""
        connection = self._by_session.get(session)
        if connection is None:
            return
        if error is not None:
            self._refuse(connection, error)
            return
        room = self._store.stagings.get(session)
        fds = [room.staging.fd] if room is not None and room.staging is not None else []
        message = Welcome(PROTOCOL_VERSION, session, self._epoch, self._instance, n_bytes)
        log.info("client connected", session=session.hex()[:8], pid=connection.peer.pid)
        self._send(connection, codec.encode_datagram(message), fds)

    def _refuse(self, connection: Connection, error: KvdError) -> None:
        message = Refused(error.code, error.message, error.details)
        log.warning("client refused", pid=connection.peer.pid, code=error.code, reason=error)
        self._send(connection, codec.encode_datagram(message), [])
        self._end(connection)

    def _send(self, connection: Connection, datagram: bytes, fds: list[int]) -> None:
        try:
            connection.peer.send(datagram, fds)
            self._watch_lifeline(connection)
        except (PeerGone, SendQueueFull, OSError) as error:
            # It dies, or does not read: the poll loop sees the end of a lifeline that is shut down.
            log.warning("lifeline lost", pid=connection.peer.pid, reason=error)
            self._shut_down(connection, "lifeline lost")

    def _watch_lifeline(self, connection: Connection) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if connection.peer.wants_write else 0)
        if mask != connection.mask:
            connection.mask = mask
            self._watch(connection.peer.fd, mask, lambda got: self._lifeline(connection, got))

    @staticmethod
    def _shut_down(connection: Connection, fault: str) -> None:
        """Let the loop see the lifeline's end."""
        connection.fault = fault
        connection.peer.shut_down()

    def _end(self, connection: Connection) -> None:
        """The client is gone: what its session held is given back."""
        pid = connection.peer.pid
        reason = connection.fault or ("died" if is_ending(pid) else "closed")
        self._drop(connection)
        if connection.session:
            log.info("client gone", session=connection.session.hex()[:8], pid=pid, reason=reason)
            self._handle(Disconnected(connection.session, reason))

    def _drop(self, connection: Connection) -> None:
        self._greeting.pop(connection, None)
        self._by_session.pop(connection.session, None)
        self._unwatch(connection.peer.fd)
        self._unwatch(connection.peer.pidfd)
        connection.peer.close()
