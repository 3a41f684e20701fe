"""One session with a daemon: the lifeline, the request socket, correlations. It never waits.

Covers what a connection is made of, sending, and taking in what has arrived. How it begins:
handshake.py. Waiting for it, with deadlines, is the blocking client's (client.py) and the asyncio
client's (aio.py).
"""

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import zmq

from kvd_client.arena import Arena
from kvd_client.errors import KvdError, Unavailable, copy_error
from kvd_client.lifeline import Received, receive_datagram
from kvd_client.staging import StagingArea
from kvd_proto import codec
from kvd_proto.errors import from_wire
from kvd_proto.messages import MAX_FAILURES, Flushed, Message, SegmentShared, Welcome
from kvd_proto.paths import REQUESTS_SOCKET

_SOON_MS = 5
"""Most replies come in 0.1 ms; and the daemon's death may go unnoticed for so long."""

Then = Callable[[Any], None]
"""What to do with a reply: a message, or a KvdError."""


class Source(Protocol):
    """Something that a driver can wait for."""

    lost: KvdError | None
    """Set when it has ended, to what everybody who waits for it is told."""
    on_end: Callable[[], None] | None
    """Called once, when its descriptors are about to be closed or to become another's."""

    def readers(self) -> dict[int, Callable[[], None]]:
        """For each of its descriptors, what to call when that is readable."""
        ...

    def receive(self) -> None:
        """Take in what has arrived. To be called after whatever may have sent, before waiting:
        the descriptor of a ZeroMQ socket tells only what is new since the socket was last used."""
        ...

    def lose(self, error: KvdError) -> None:
        """End it from our side; whoever waits is told `error`."""
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Commit:
    """An append on its way. `number` and the counts of blocks are known once it is `answered`.

    `stored` are copied, `present` were there already, `joined` are being stored by another session
    at this moment. `error` says why the append was refused, or, after a flush of this commit or a
    later one, why its blocks did not become visible.
    """

    session: "Session"
    n_bytes: int
    """Of the payloads."""
    answered: bool = False
    number: int = 0
    stored: int = 0
    present: int = 0
    joined: int = 0
    error: KvdError | None = None

    def is_answered(self) -> bool:
        """Whether the daemon has taken the append in, or has refused it."""
        return self.answered


class Session:
    """An open session. `lost` is set when it has ended, for whatever reason."""

    def __init__(
        self,
        lifeline: socket.socket,
        welcome: Welcome,
        staging: StagingArea | None,
        path: Path,
    ) -> None:
        """Takes over the lifeline. Use Handshake.begin()."""
        self._lifeline = lifeline
        self._news = select.poll()
        self._news.register(lifeline, select.POLLIN)
        self.welcome = welcome
        self.path = path
        self.staging = staging
        self.lost: KvdError | None = None
        self.on_end: Callable[[], None] | None = None
        self.arenas: dict[int, Arena] = {}
        self.replies = 0
        """Received so far."""
        self.unanswered_appends = 0
        self.last_commit = 0
        """The highest number that a commit was answered with."""
        self.commits: WeakValueDictionary[int, Commit] = WeakValueDictionary()
        """Those that were taken in and whose end we have not learned."""
        self._untold: list[Any] = []
        self._next = 0
        self._asked: dict[int, type[Any]] = {}
        self._then: dict[int, Then] = {}
        self.dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        try:
            self.dealer.setsockopt(zmq.LINGER, 0)
            self.dealer.setsockopt(zmq.RCVTIMEO, _SOON_MS)
            self.dealer.setsockopt(zmq.ROUTING_ID, welcome.session)
            self.dealer.connect(f"ipc://{path / REQUESTS_SOCKET}")
            self._requests_fd = int(self.dealer.getsockopt(zmq.FD))
        except BaseException:
            self.dealer.close(linger=0)
            raise

    @property
    def lifeline_fd(self) -> int:
        """While a copy of it is open the daemon gives nothing back, whatever becomes of us."""
        return self._lifeline.fileno()

    @property
    def in_flight(self) -> int:
        """Requests whose reply has not come."""
        return len(self._then)

    def readers(self) -> dict[int, Callable[[], None]]:
        return {self._requests_fd: self.receive, self._lifeline.fileno(): self.receive_lifeline}

    # --- requests

    def send(self, message: Message, then: Then) -> int:
        """Send a request; `then` is called with its reply, or with the error that ends the
        session.

        Returns the correlation. Raises what `lost` says if the session is lost, and BadMessage for
        a message that cannot be sent.
        """
        if self.lost is not None:
            raise copy_error(self.lost)
        number = self._next + 1
        frame = codec.encode_request(number, message)
        self._next = number
        self._asked[number] = type(message)
        self._then[number] = then
        try:
            self.dealer.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Its caller is told by the exception alone.
            del self._then[number], self._asked[number]
            lost = Unavailable(f"the daemon takes no requests: {error.strerror}")
            self.lose(lost)
            raise lost from error
        return number

    def post(self, message: Message) -> None:
        """Send a request whose reply nobody needs. Never fails: a session that has ended has given
        back what this would."""
        with suppress(KvdError):
            self.send(message, _ignore)

    def redirect(self, number: int, then: Then) -> None:
        """Let the reply to an open request go elsewhere."""
        if number in self._then:
            self._then[number] = then

    def receive(self) -> None:
        """Take in the replies that have arrived, and call what waits for them."""
        try:
            # Asking first: a recv that finds nothing raises, which costs more than asking.
            while self.lost is None and int(self.dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._take_in(self.dealer.recv(zmq.NOBLOCK))
        except zmq.ZMQError as error:
            self.lose(Unavailable(f"the request socket broke: {error.strerror}"))

    def receive_soon(self) -> bool:
        """Wait some milliseconds for one reply, in the quickest way there is, which does not see
        the lifeline. False if none has come."""
        try:
            self._take_in(self.dealer.recv())
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            self.lose(Unavailable(f"the request socket broke: {error.strerror}"))
        return self.lost is None

    def _take_in(self, frame: bytes) -> None:
        try:
            reply = codec.decode_reply(frame, self._asked)
            self.replies += 1
            then = self._then.pop(reply.correlation, None)
            self._asked.pop(reply.correlation, None)
            if isinstance(reply.body, Flushed):
                self._note_failures(reply.body)
            if then is not None:
                then(reply.body)
        except KvdError as error:
            self.lose(Unavailable(f"the daemon's reply cannot be read: {error}"))
        except BaseException:
            # KeyboardInterrupt, say: whoever waits for this reply has perhaps not been told.
            self.lose(Unavailable("taking in a reply was interrupted"))
            raise

    # --- the lifeline

    def look(self) -> None:
        """Take in what the lifeline has to tell: above all, that the daemon has gone."""
        if self.lost is None and self._news.poll(0):
            self.receive_lifeline()

    def receive_lifeline(self) -> None:
        while self.lost is None:
            try:
                received = receive_datagram(self._lifeline)
                if received is None:
                    return
                self._told(received)
            except KvdError as error:
                self.lose(error)
            except OSError as error:
                self.lose(Unavailable(f"the lifeline broke: {error.strerror}"))
            except BaseException:
                self.lose(Unavailable("taking in a descriptor was interrupted"))
                raise

    def _told(self, received: Received) -> None:
        message, fds = received
        if isinstance(message, SegmentShared) and len(fds) == 2:
            try:
                self.arenas[message.segment] = Arena(fds[0], message.size, fds[1])
            except (OSError, ValueError) as error:
                os.close(fds[0])
                raise Unavailable(f"an arena's index cannot be mapped: {error}") from error
            return
        for fd in fds:
            os.close(fd)
        if message is None:
            raise Unavailable("the daemon has ended the session")
        if isinstance(message, SegmentShared):
            raise Unavailable("an arena's descriptors did not arrive: too many files are open")

    # --- failed commits

    def take_failures(self) -> list[Any]:
        """[commit, code, message] of all failures that flushes have told since the last call."""
        untold, self._untold = self._untold, []
        return untold

    def _note_failures(self, reply: Flushed) -> None:
        # The daemon tells each only once, and perhaps to a flush that only waited for room.
        for number, code, text in reply.failures:
            commit = self.commits.get(number)
            if commit is not None:
                commit.error = from_wire(code, text, {})
            self._untold.append([number, code, text])
        del self._untold[:-MAX_FAILURES]

    # --- the end

    def lose(self, error: KvdError, *, hang_up: bool = False) -> None:
        """End the session from our side: everybody who waits is told `error`.

        Views of blocks, and staging that somebody writes into, stay mapped until they are dropped.
        `hang_up` ends it for the daemon too; without it that happens when all copies of the
        lifeline are closed (arrays that are read after the daemon hung keep one).
        """
        if self.lost is not None:
            return
        self.lost = copy_error(error)
        if self.on_end is not None:
            self.on_end()
            self.on_end = None
        self.dealer.close(linger=0)
        if hang_up:
            # A forked child may have a copy.
            with suppress(OSError):
                self._lifeline.shutdown(socket.SHUT_RDWR)
        self._lifeline.close()
        for arena in self.arenas.values():
            arena.close()
        if self.staging is not None:
            self.staging.close()
        waiting, self._then = self._then, {}
        self._asked.clear()
        for then in waiting.values():
            then(copy_error(error))

    def close_mappings(self) -> None:
        """Unmap the arenas. Raises ViewsAlive while somebody holds a view; then go on as before."""
        for arena in self.arenas.values():
            arena.unmap()


def _ignore(_: Any) -> None:
    pass
