"""What the blocking and the asyncio client do, written once: generators that say what to wait for.

An operation yields `Connect` or `Wait` and is sent the answer; everything between two yields
happens at once. The drivers are `Client.run` (client.py) and `AsyncClient.run` (aio.py). The
things that users hold, `Context` and `Sequence`, are in context.py and get their methods from
there.
"""

import logging
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvd_client.errors import Closed, Forked, KvdError, ServiceError, Unavailable
from kvd_client.session import Session
from kvd_proto.messages import Message
from kvd_proto.paths import LIFELINE_SOCKET, runtime_dirs

T = TypeVar("T")
logger = logging.getLogger("kvd_client")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts to find an absent daemon: doubled from the first to the longest."""


class Connect(NamedTuple):
    """Ask the driver for a new session; it may take `timeout` seconds."""

    path: Path
    client: str
    staging_bytes: int
    timeout: float


class Wait(NamedTuple):
    """Ask the driver to take in replies until `condition` holds, or `timeout` seconds have passed.

    Then the driver raises DeadlineExceeded; and because a daemon that does not answer must not meet
    us in a state that went on, the session is lost with it, unless `may_fail`.
    """

    session: Session
    condition: Callable[[], object]
    timeout: float
    may_fail: bool = False


Ask = Connect | Wait
Operation = Generator[Ask, Any, T]


class ClientState:
    """What both clients share: the session, when to look for a daemon again, and who we are."""

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None,
        instance: str,
        name: str,
        staging_bytes: int,
        timeout: float,
        fail_open: bool,
    ) -> None:
        self.path = Path(runtime_dir) if runtime_dir is not None else find_runtime_dir(instance)
        self.name = name
        self.staging_bytes = staging_bytes
        self.timeout = timeout
        self.fail_open = fail_open
        self.session: Session | None = None
        self.closed = False
        self._pid = os.getpid()
        self._pause = 0.0
        self._next_attempt = 0.0
        self._outage: KvdError | None = None

    def ensure_session(self) -> Operation[Session]:
        """The open session, or a new one. Raises Unavailable at once between two attempts."""
        self.check()
        if self.session is not None and self.session.lost is None:
            return self.session
        if self._outage is not None and time.monotonic() < self._next_attempt:
            raise self._outage
        try:
            session: Session = yield Connect(self.path, self.name, self.staging_bytes, self.timeout)
        except ServiceError as error:
            self.note_outage(error)
            raise
        self.session = session
        self._pause = 0.0
        if self._outage is not None:
            logger.info("the kvd daemon at %s is back", self.path)
            self._outage = None
        return session

    def note_outage(self, error: KvdError) -> None:
        """The daemon is not to be had: warn once, and look again after a pause.

        An outage that is noted already is not a new one: its pause goes on.
        """
        if error is self._outage:
            return
        if self._outage is None and self.fail_open:
            logger.warning("going on without the shared K/V cache: %s", error)
        self._outage = error
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
        self._next_attempt = time.monotonic() + self._pause

    def check(self) -> None:
        """Raise Closed or Forked."""
        if self.closed:
            raise Closed("this client has been closed")
        if os.getpid() != self._pid:
            raise Forked(
                "this client was opened before a fork; a child opens its own",
                opened_in=self._pid,
                used_in=os.getpid(),
            )

    def call(self, message: Message, extra_time: float = 0.0) -> Operation[Any]:
        """Send a request to the open session and wait for its reply; raises what is answered."""
        session = yield from self.ensure_session()
        return (yield from call(session, message, self.timeout + extra_time))


def call(
    session: Session, message: Message, timeout: float, *, may_fail: bool = False
) -> Operation[Any]:
    """Send a request and wait for its reply; raises what is answered. `may_fail`: see Wait."""
    box: list[Any] = []
    session.send(message, box.append)
    yield Wait(session, box.__len__, timeout, may_fail)
    body = box[0]
    if isinstance(body, KvdError):
        if body.code == "unknown_session":
            # The daemon was restarted and we have not seen the lifeline's end yet.
            session.lose(Unavailable("the daemon was restarted"))
        raise body
    return body


def find_runtime_dir(instance: str) -> Path:
    """The first directory in which a daemon listens; where one would be started if there is
    none."""
    candidates = runtime_dirs(instance)
    for path in candidates:
        if (path / LIFELINE_SOCKET).exists():
            return path
    return candidates[-1]
