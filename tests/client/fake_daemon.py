"""A peer that speaks the protocol and says what a test wants: for what no real daemon says on
demand."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import KvdError
from kvd_proto.messages import (
    Allocated,
    Appended,
    ContextOpened,
    Done,
    Hello,
    ModelRegistered,
    OpenContext,
    RegisterModel,
    SegmentShared,
    Welcome,
)
from kvd_proto.paths import LIFELINE_SOCKET, REQUESTS_SOCKET

Answer = Callable[[Any], Any]
"""From a request's message to a reply's, to an error, or to the bytes of a frame."""

PAGE = 4096


class FakeDaemon:
    """Welcomes one client after another, and answers with `answer`; None means as usual."""

    def __init__(self, path: Path, answer: Answer, welcome: Callable[[Hello], Any]) -> None:
        self._answer = answer
        self._welcome = welcome
        self._n_commits = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path / LIFELINE_SOCKET))
        self._listener.listen()
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(f"ipc://{path / REQUESTS_SOCKET}")
        self._wake, self._stop = socket.socketpair()
        self._lifeline: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join()
        for each in (self._listener, self._lifeline, self._wake):
            if each is not None:
                each.close()
        self._router.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for each in (self._listener, self._router, self._wake):
            poller.register(each, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._wake.fileno() in ready:
                return
            if self._listener.fileno() in ready:
                self._accept()
            if self._router in ready:
                identity, frame = self._router.recv_multipart()
                self._router.send_multipart([identity, self._frame(frame)])

    def _accept(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
        self._lifeline, _ = self._listener.accept()
        hello = codec.decode_datagram(self._lifeline.recv(PAGE))
        answer = self._welcome(hello)
        if isinstance(answer, bytes):
            self._lifeline.send(answer)
            return
        self._send(answer, "staging", answer.staging_bytes)

    def _send(self, message: Any, name: str, size: int) -> None:
        assert self._lifeline is not None
        memory = os.memfd_create(f"kvd-fake-{name}")
        os.ftruncate(memory, size)
        # An arena's index comes with it: here one without keys, of the same length.
        fds = [memory] * (0 if not size else 2 if name == "arena" else 1)
        socket.send_fds(self._lifeline, [codec.encode_datagram(message)], fds)
        os.close(memory)

    def _frame(self, frame: bytes) -> bytes:
        correlation, message = codec.decode_request(frame)
        body = self._answer(message)
        if isinstance(body, bytes):
            return body
        if isinstance(body, KvdError):
            return codec.encode_error(correlation, body)
        return codec.encode_reply(correlation, self._usual(message) if body is None else body)

    def _usual(self, message: Any) -> Any:
        match type(message).__name__:
            case "RegisterModel":
                assert isinstance(message, RegisterModel)
                self._send(SegmentShared(1, 8 * PAGE), "arena", 8 * PAGE)
                return ModelRegistered(1, 1, PAGE, PAGE, 8)
            case "OpenContext":
                assert isinstance(message, OpenContext)
                return ContextOpened(5, [1] * len(message.busy))
            case "Alloc":
                return Allocated(0, 1, 0, 0, b"")
            case "Append":
                self._n_commits += 1
                return Appended(self._n_commits, 1, 0, 0)
            case _:
                return Done()


def usual_welcome(hello: Hello) -> Welcome:
    """With the staging that was asked for."""
    size = hello.staging_bytes + PAGE if hello.staging_bytes else 0
    session = b"\1" + os.urandom(15)
    return Welcome(PROTOCOL_VERSION, session, bytes(16), "fake", size)


@contextmanager
def fake_daemon(
    path: Path,
    answer: Answer = lambda _: None,
    welcome: Callable[[Hello], Any] = usual_welcome,
) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(path, answer, welcome)
    try:
        yield daemon
    finally:
        daemon.close()
