"""The request socket: a ZeroMQ ROUTER on ipc://, requests in, replies out.

Covers binding it, frames to messages and back, and clients that do not read. What a message looks
like: kvd_proto.codec. What a request does: server.py.

ZeroMQ's descriptor is edge-triggered: it says that something may have happened since the socket was
last used, for sending or for receiving. So the loop asks `pending` just before it waits.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from kvd import log
from kvd.core.events import SessionId
from kvd.group import SOCKET_MODE, admit
from kvd.timing import RequestTimes
from kvd_proto import codec
from kvd_proto.errors import BadMessage, InternalError, KvdError

_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _RCVMORE, _POLLIN = int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.POLLIN)


class Incoming(NamedTuple):
    """A request. `session` is what its sender calls itself: the core knows whether there is such a
    session. `message` is what it asks, or the KvdError to answer one with that makes no sense."""

    session: SessionId
    correlation: int
    message: Any


class Requests:
    """The ROUTER. `fd` is for the poll loop, edge-triggered. Nothing here blocks.

    A client that connects with the routing id of another one that is connected is not listened to
    (ROUTER_HANDOVER is 0): neither its requests nor the other's replies reach the wrong side.
    """

    def __init__(
        self, path: Path, group: int | None, on_unread: Callable[[SessionId], None]
    ) -> None:
        """Bind at `path`, for this user and the members of `group` (a gid) if there is one; the
        caller holds the instance's lock.

        `on_unread` is called when a reply is lost because its client has left 1,000 unread.
        Raises zmq.ZMQError and OSError, leaving nothing open.
        """
        self._path = path
        self._on_unread = on_unread
        self.times = RequestTimes()
        self._router = _bind(path, group)
        # The method below pyzmq's wrapper, which costs 1 us a frame for options we do not use.
        self._send = super(zmq.Socket, self._router).send
        self.fd = int(self._router.getsockopt(zmq.FD))

    def pending(self) -> bool:
        """Whether a request waits."""
        # Cheaper than a receive that fails: ZMQError looks its text up.
        return bool(int(self._router.getsockopt(_EVENTS)) & _POLLIN)

    def receive(self) -> Incoming | None:
        """Take the next request in; None if there is none."""
        router = self._router
        try:
            session = router.recv(_NOBLOCK)
        except zmq.Again:
            return None
        # A message comes as a whole: there is a frame, and its `more` is cheaper than the socket's.
        frame = router.recv(_NOBLOCK, copy=False)
        try:
            if frame.more:
                raise BadMessage("a request is exactly one frame", frames=1 + self._skip_frames())
            correlation, message = codec.decode_request(frame.bytes)
        except BadMessage as error:
            known = error.details.pop("correlation", 0)
            # Without the frames: one of them will hold this very error, in a cycle with the bytes.
            error.__traceback__ = error.__context__ = None
            return Incoming(session, known if isinstance(known, int) else 0, error)
        except Exception as error:  # a fault of ours in decoding: nothing has happened yet
            log.error("request could not be decoded", error, length=len(frame.bytes))
            return Incoming(session, 0, InternalError(f"{type(error).__name__}: {error}"))
        return Incoming(session, correlation, message)

    def reply(self, session: SessionId, correlation: int, body: Any) -> None:
        """Answer a request with a reply message or a KvdError. One that has gone hears nothing."""
        if isinstance(body, KvdError):
            frame = codec.encode_error(correlation, body)
        else:
            try:
                frame = codec.encode_reply(correlation, body)
            except InternalError as error:  # a report that is too long
                frame = codec.encode_error(correlation, error)
        try:
            self._send(session, _MORE)
            self._send(frame, _NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("reply dropped", session=session.hex()[:8], reason=error.strerror)
            if error.errno == zmq.EAGAIN:
                self._on_unread(session)
        self.times.answered(session, correlation, body)

    def close(self) -> None:
        """Drop what was not sent, and remove the socket."""
        self._router.close(linger=0)
        self._path.unlink(missing_ok=True)
        self._router.context.term()

    def _skip_frames(self) -> int:
        """Drop what is left of a message; how many frames it was."""
        skipped = 0
        while self._router.getsockopt(_RCVMORE):
            self._router.recv(_NOBLOCK)
            skipped += 1
        return skipped


def _bind(path: Path, group: int | None) -> "zmq.Socket[bytes]":
    router = zmq.Context().socket(zmq.ROUTER)
    try:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, codec.MAX_MESSAGE_BYTES)
        # With it a reply to nobody is an error that we see, and not a silent loss.
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        path.unlink(missing_ok=True)
        umask = os.umask(0o177)
        try:
            router.bind(f"ipc://{path}")
        finally:
            os.umask(umask)
        if group is not None:
            admit(path, group, SOCKET_MODE)
    except BaseException:
        router.close(linger=0)
        router.context.term()
        raise
    return router
