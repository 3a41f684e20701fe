"""What the blocking and the asyncio client do, written once: generators that say what to wait for.

An operation yields `Wait`s; everything between two of them happens at once. The drivers are
`Client.run` (client.py) and `AsyncClient.run` (aio.py). What becomes of a caller who gives up in
the middle (a deadline, KeyboardInterrupt, a cancelled task) is settled here too, in
`call`: both drivers throw it into the operation at the Wait where it happened.

Covers the session: finding a daemon, losing it, finding it again. The things that users hold,
`Context` and `Sequence`: state.py, context.py, appending.py.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

from kvd_client.errors import (
    Closed,
    DeadlineExceeded,
    Forked,
    KvdError,
    ServiceError,
    Unavailable,
    ViewsAlive,
    copy_error,
)
from kvd_client.handshake import Handshake
from kvd_client.session import Commit, Session, Source
from kvd_proto.geometry import PAGE_BYTES
from kvd_proto.messages import Flush, Flushed, Message
from kvd_proto.paths import runtime_dirs

if TYPE_CHECKING:
    from kvd_client.state import ContextState

T = TypeVar("T")
logger = logging.getLogger("kvd_client")

DEFAULT_STAGING = 64 << 20
"""Bytes: a prompt of a few thousand tokens of a small model at once, larger ones in pieces."""
DEFAULT_TIMEOUT = 5.0
FAIL_OPEN_TIMEOUT = 0.05
"""Seconds that a worker loses at most when the daemon hangs; it computes by itself then."""
WAITED_PART = 0.8
"""Of them, the part that is waited. The rest is for waking up, and for what is done by oneself."""
PATIENCE_TO_OPEN = 1.0
"""Seconds for a client or a context to be opened, at the least. The daemon gives the staging its
memory first, which takes 0.6 s for a GiB."""
SLOWEST_MEMORY = 1 << 27
"""Bytes a second: the first touch of 1 GiB has taken 8.8 s on a virtual machine."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between attempts to find an absent daemon, with fail_open: doubled from the first to the
longest. An attempt costs some 20 us."""


class Wait(NamedTuple):
    """Ask the driver to take in what arrives from `source` until `condition` holds.

    The driver throws what `source.lost` says if that ends before, and DeadlineExceeded when it has
    looked in vain for `timeout` seconds (it looks once if that is not above 0). A daemon that
    misses a deadline hangs, and the source is lost with it, unless the wait `may_fail`.
    """

    source: Source
    condition: Callable[[], object]
    timeout: float
    may_fail: bool = False

    def expire(self) -> DeadlineExceeded:
        """The error to throw when the time is over."""
        error = DeadlineExceeded(
            "the daemon has not answered in time", waited_seconds=max(0.0, round(self.timeout, 6))
        )
        if not self.may_fail:
            self.source.lose(error)
        return error


Operation = Generator[Wait, None, T]


class Shown(Protocol):
    """Something whose bytes users look at, some of them in the staging."""

    def hide(self) -> None:
        """Raises ViewsAlive, and changes nothing, while somebody looks at them."""
        ...


class ClientState:
    """What both clients share: the session, when to look for a daemon again, and who we are."""

    overlapping = False
    """Whether others use the client while an operation waits."""

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None,
        *,
        instance: str,
        name: str,
        staging_bytes: int,
        timeout: float | None,
        fail_open: bool,
        welcome_timeout: float | None = None,
    ) -> None:
        self.runtime_dirs = [Path(runtime_dir)] if runtime_dir else runtime_dirs(instance)
        self.instance = instance
        self.name = name
        self.staging_bytes = staging_bytes
        self.fail_open = fail_open
        self.patience = DEFAULT_TIMEOUT if timeout is None else timeout
        """Seconds for an answer that no request waits for, of a flush or a report."""
        self.timeout = self.patience
        """Seconds for an answer that a request waits for."""
        if fail_open:
            self.timeout = WAITED_PART * (FAIL_OPEN_TIMEOUT if timeout is None else timeout)
        self.welcome_timeout = welcome_timeout
        self.session: Session | None = None
        self.contexts: set[ContextState] = set()
        """Those that are not closed."""
        self.shown: WeakSet[Shown] = WeakSet()
        self.closed = False
        self._handshake: Handshake | None = None
        self._pid = os.getpid()
        self._pause = 0.0
        self._next_attempt = 0.0
        self._outage: KvdError | None = None

    @property
    def staging_room(self) -> int:
        """Bytes that commits on their way may take together: what was asked, or what the daemon
        has granted, which may be less."""
        session = self.session
        if session is None or session.staging is None:
            return self.staging_bytes
        return session.staging.size - PAGE_BYTES

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened the client."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise Closed or Forked."""
        if self.closed:
            raise Closed("this client has been closed")
        if self.forked:
            raise Forked(
                "this client was opened before a fork; a child opens its own",
                opened_in=self._pid,
                used_in=os.getpid(),
            )

    def deadline(self) -> float:
        """By when an answer that a request waits for must be there."""
        return time.monotonic() + self.timeout

    def first_deadline(self) -> float:
        """The same for what is not in the way of a request: opening the client, or a context."""
        return time.monotonic() + max(self.timeout, PATIENCE_TO_OPEN)

    def timeout_for(self, n_bytes: int) -> float:
        """Seconds for an answer before which the daemon may have to give `n_bytes` their memory."""
        return self.timeout + self.seconds_for(n_bytes)

    def seconds_for(self, n_bytes: int) -> float:
        """How much longer that may take."""
        return n_bytes / SLOWEST_MEMORY

    # --- the session

    def live_session(self) -> Session | None:
        """The open session, if the daemon has not gone."""
        self.check()
        session = self.session
        if session is None:
            return None
        session.look()
        return session if session.lost is None else None

    def goes_on(self, session: Session) -> bool:
        """Whether a session has not ended, as far as can be told without waiting for anybody."""
        session.look()
        return session.lost is None

    def ensure_session(self, deadline: float) -> Operation[Session]:
        """The open session, or a new one. Raises Unavailable, DeadlineExceeded, or what the daemon
        refuses with.

        With fail_open that is the last outage's error, at once, between two attempts. A daemon
        that hangs is waited for once, and welcomes us when it goes on. The welcome of one that has
        come back is waited for half of the time: a welcome that comes at the last moment leaves
        none to open the context, and a daemon is taken to hang that has been slow only.
        """
        comes_back = self.session is not None or self._outage is not None
        while True:
            session = self.live_session()
            if session is not None:
                return session
            if self._handshake is None:
                self._handshake = self._begin()
            handshake = self._handshake
            wait = deadline - time.monotonic()
            if self.fail_open:
                wait *= 0.0 if handshake.waited_for else 0.5 if comes_back else 1.0
            try:
                yield Wait(handshake, handshake.has_session, wait, may_fail=True)
            except DeadlineExceeded:
                handshake.waited_for = True
                path, pid = str(handshake.path), handshake.daemon_pid
                error = DeadlineExceeded("the daemon does not answer", path=path, pid=pid)
                self._note_outage(error)
                raise error from None
            except KvdError as error:
                if self._handshake is handshake:
                    self._handshake = None
                    self._note_outage(error)
                raise
            if self._handshake is handshake:
                self._handshake = None
                self._welcomed(handshake)

    def first_session(self) -> Operation[Session]:
        """Like ensure_session, for the very first one."""
        if self.welcome_timeout is not None:
            return self.ensure_session(time.monotonic() + self.welcome_timeout)
        return self.ensure_session(self.first_deadline())

    def without_daemon(self, error: KvdError) -> bool:
        """Whether to go on without a daemon after `error`, because of fail_open.

        If so, the session is given up: ids that we choose from now on must not meet ids that it
        still hands out.
        """
        if not self.fail_open or self.closed or self.forked:
            return False
        has_session = self.session is not None and self.session.lost is None
        if has_session and not isinstance(error, ServiceError):
            return False
        if self.session is not None:
            self.session.lose(error)
        self._warn(error)
        return True

    def _begin(self) -> Handshake:
        if self.fail_open and self._outage is not None and time.monotonic() < self._next_attempt:
            raise copy_error(self._outage)
        try:
            handshake = Handshake.begin(self.runtime_dirs, self.name, self.staging_bytes)
        except KvdError as error:
            self._note_outage(error)
            raise
        # Who has just waited for an answer in vain does not wait for a welcome, too.
        handshake.waited_for = self._hangs()
        return handshake

    def _hangs(self) -> bool:
        return self.session is not None and isinstance(self.session.lost, DeadlineExceeded)

    def _welcomed(self, handshake: Handshake) -> None:
        self.session = handshake.session
        self._pause = 0.0
        if self._outage is not None:
            logger.info("the kvd daemon at %s is back", handshake.path)
            self._outage = None

    def _note_outage(self, error: KvdError) -> None:
        """There is no session to be had: look again after a pause."""
        self._warn(error)
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
        self._next_attempt = time.monotonic() + self._pause

    def _warn(self, error: KvdError) -> None:
        """Once for each outage."""
        if self._outage is None and self.fail_open:
            logger.warning("going on without the shared K/V cache: %s", error)
        self._outage = copy_error(error)

    # --- requests

    def call(
        self,
        session: Session,
        message: Message,
        deadline: float,
        late: Callable[[Any], None] | None = None,
    ) -> Operation[Any]:
        """`call`, with a deadline."""
        return (yield from call(session, message, deadline - time.monotonic(), late=late))

    def ask(self, message: Message, longer: float = 0.0) -> Operation[Any]:
        """Send a request that belongs to no context, and wait for its reply, so many seconds longer
        than for others."""
        deadline = time.monotonic() + self.patience + longer
        session = yield from self.ensure_session(deadline)
        return (yield from self.call(session, message, deadline))

    def flush_commit(self, commit: Commit | None, timeout: float | None) -> Operation[Flushed]:
        """Wait until a commit (None: all) is finished, and tell what has failed since last time."""
        self.check()
        deadline = time.monotonic() + (self.patience if timeout is None else timeout)
        if commit is None:
            session = yield from self.ensure_session(deadline)
            yield from settle_appends(session, deadline - time.monotonic())
            number = session.last_commit
        else:
            session = commit.session
            if not commit.answered:
                wait = deadline - time.monotonic()
                yield Wait(session, commit.is_answered, wait, may_fail=True)
            number = commit.number
            if not number:
                assert commit.error is not None
                raise copy_error(commit.error)
        left = deadline - time.monotonic()
        reply: Flushed = yield from call(session, Flush(number), left, may_fail=True)
        return Flushed(reply.completed, session.take_failures())

    # --- the end

    def shut_down(self) -> None:
        """End the session, and everything that was opened. Raises ViewsAlive while views of blocks
        are alive, and changes nothing."""
        if self.closed:
            return
        if self.session is not None and not self.forked:
            # The daemon takes the staging back when the session ends: they would see zeros.
            for each in list(self.shown):
                each.hide()
            try:
                self.session.close_mappings()
            except ViewsAlive:
                gc.collect()  # perhaps only in a cycle, of an exception's frames for instance
                self.session.close_mappings()
        self.closed = True
        for context in self.contexts:
            context.end()
        self.contexts.clear()
        closed = Closed("this client has been closed")
        handshake, self._handshake = self._handshake, None
        if self.forked:
            # What is closed here is the child's; what it shares with its parent is left alone.
            for source in (handshake, self.session):
                if source is not None:
                    source.on_end = None
        if handshake is not None:
            handshake.lose(closed)
        if self.session is not None:
            self.session.lose(closed, hang_up=not self.forked)


def call(
    session: Session,
    message: Message,
    timeout: float,
    may_fail: bool = False,
    late: Callable[[Any], None] | None = None,
) -> Operation[Any]:
    """Send a request and wait for its reply; raises what is answered. `may_fail`: see Wait.

    If the caller gives up, for whatever reason, and the session goes on, `late` is called with the
    reply when it comes, to undo what was done for nobody.
    """
    box: list[Any] = []
    number = session.send(message, box.append)
    try:
        yield Wait(session, box.__len__, timeout, may_fail)
    except BaseException:
        if box:
            _nobody_waits(late, box[0])
        else:
            session.redirect(number, partial(_nobody_waits, late))
        raise
    body = box[0]
    if isinstance(body, KvdError):
        if body.code == "unknown_session":
            # The daemon was restarted, and we have not seen the lifeline's end yet.
            session.lose(Unavailable("the daemon was restarted"))
        raise body
    return body


def _nobody_waits(late: Callable[[Any], None] | None, body: Any) -> None:
    if late is not None and not isinstance(body, KvdError):
        late(body)


def settle_appends(session: Session, timeout: float, may_fail: bool = True) -> Operation[None]:
    """Wait until every append that was sent is answered, or raise DeadlineExceeded. `may_fail`: see
    Wait."""
    yield Wait(session, lambda: not session.unanswered_appends, timeout, may_fail)
