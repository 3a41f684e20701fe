"""One session with a daemon: the lifeline, the request socket, correlations. It never waits.

Covers what a connection is made of, sending, and taking in what has arrived. Waiting for it, with
deadlines, is the blocking client's (client.py) and the asyncio client's (aio.py).
"""

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from kvd_client.arena import Arena
from kvd_client.errors import DeadlineExceeded, KvdError, Unavailable
from kvd_client.staging import StagingArea
from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import from_wire
from kvd_proto.messages import Hello, Message, Refused, SegmentShared, Welcome
from kvd_proto.paths import LIFELINE_SOCKET, REQUESTS_SOCKET

_MAX_DATAGRAM = 64 * 1024

Then = Callable[[Any], None]
"""What to do with a reply: a message, or a KvdError."""


class Session:
    """An open session. `lost` is set when it has ended, for whatever reason."""

    def __init__(self, lifeline: socket.socket, welcome: Welcome, staging_fd: int, path: Path):
        """Takes over the socket and the descriptor (-1: none). Use Session.connect()."""
        self._lifeline = lifeline
        self.welcome = welcome
        self.pid = os.getpid()
        self.lost: KvdError | None = None
        self.arenas: dict[int, Arena] = {}
        self.staging: StagingArea | None = None
        if staging_fd >= 0:
            self.staging = StagingArea(mmap.mmap(staging_fd, welcome.staging_bytes))
            os.close(staging_fd)
        self.last_commit = 0
        """The highest commit number that an append was answered with."""
        self._next = 0
        self._asked: dict[int, type[Any]] = {}
        self._then: dict[int, Then] = {}
        self.dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.ROUTING_ID, welcome.session)
        self.dealer.connect(f"ipc://{path / REQUESTS_SOCKET}")

    @classmethod
    def connect(cls, path: Path, client: str, staging_bytes: int, timeout: float) -> "Session":
        """Open a session with the daemon at `path`. Blocks for `timeout` seconds at most.

        Raises Unavailable if no daemon answers in time, or the error that the daemon refuses with.
        """
        deadline = time.monotonic() + timeout
        lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        lifeline.setblocking(False)
        fds: list[int] = []
        try:
            lifeline.connect(str(path / LIFELINE_SOCKET))
            lifeline.send(codec.encode_datagram(Hello(PROTOCOL_VERSION, client, staging_bytes)))
            if not _readable(lifeline, deadline):
                raise Unavailable("the daemon does not answer", path=str(path), waited=timeout)
            datagram, fds, _, _ = socket.recv_fds(lifeline, _MAX_DATAGRAM, 4)
            message = codec.decode_datagram(datagram)
            if isinstance(message, Refused):
                raise from_wire(message.code, message.message, message.details)
            if not isinstance(message, Welcome) or len(fds) != (message.staging_bytes > 0):
                raise Unavailable("the daemon did not welcome us", path=str(path))
            return cls(lifeline, message, fds.pop() if fds else -1, path)
        except OSError as error:
            lifeline.close()
            raise Unavailable(
                f"no daemon at {path}: {error.strerror or error}", path=str(path)
            ) from error
        except BaseException:
            for fd in fds:
                os.close(fd)
            lifeline.close()
            raise

    @property
    def lifeline_fd(self) -> int:
        return self._lifeline.fileno()

    @property
    def in_flight(self) -> int:
        """Requests whose reply has not come."""
        return len(self._then)

    def send(self, message: Message, then: Then) -> int:
        """Send a request; `then` is called with its reply, or with the error that ended the
        session.

        Returns the correlation. Raises Unavailable if the session is lost.
        """
        if self.lost is not None:
            raise self.lost
        self._next += 1
        number = self._next
        self._asked[number] = type(message)
        self._then[number] = then
        try:
            self.dealer.send(codec.encode_request(number, message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            lost = Unavailable(f"the daemon takes no requests: {error.strerror}")
            self.lose(lost)
            raise lost from error
        return number

    def receive(self) -> None:
        """Take in what has arrived, without waiting, and call what waits for it."""
        while self.lost is None:
            try:
                frame = self.dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            reply = codec.decode_reply(frame, self._asked)
            then = self._then.pop(reply.correlation, None)
            self._asked.pop(reply.correlation, None)
            if then is not None:
                then(reply.body)

    def receive_lifeline(self) -> None:
        """Take in descriptors that have arrived; at the lifeline's end the session is lost."""
        while self.lost is None:
            try:
                datagram, fds, _, _ = socket.recv_fds(self._lifeline, _MAX_DATAGRAM, 4)
            except BlockingIOError:
                return
            except OSError as error:
                self.lose(Unavailable(f"the lifeline broke: {error.strerror}"))
                return
            if not datagram:
                self.lose(Unavailable("the daemon has ended the session"))
                return
            message = codec.decode_datagram(datagram)
            if isinstance(message, SegmentShared) and len(fds) == 1:
                self.arenas[message.segment] = Arena(fds[0], message.size)
            else:
                for fd in fds:
                    os.close(fd)

    def lose(self, error: KvdError) -> None:
        """End the session from our side: everybody who waits is told `error`."""
        if self.lost is not None:
            return
        self.lost = error
        self.dealer.close(linger=0)
        self._lifeline.close()
        for arena in self.arenas.values():
            arena.close()
        if self.staging is not None:
            # A view that somebody still writes through keeps the mapping, and hurts nobody.
            with contextlib.suppress(BufferError):
                self.staging.close()
        waiting, self._then = self._then, {}
        self._asked.clear()
        for then in waiting.values():
            then(error)

    def close_mappings(self) -> None:
        """Unmap the arenas. Raises ViewsAlive while somebody holds a view; then go on as before."""
        for arena in self.arenas.values():
            arena.unmap()

    def time_out(self, waited: float) -> DeadlineExceeded:
        """The daemon hangs: an answer that comes later must not meet a state that went on."""
        error = DeadlineExceeded("the daemon did not answer in time", waited_seconds=waited)
        self.lose(error)
        return error


def _readable(sock: socket.socket, deadline: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
