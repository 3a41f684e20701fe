"""The daemon's loop: sockets in and out, the core in the middle, the store on the other side.

One thread, one epoll. ZeroMQ's descriptor is edge-triggered: it says that something may have
happened since the socket was last used, so the loop drains the socket each time before it waits.

    lifeline ──Connected/Disconnected──►┐
    ROUTER ──decoded Requested─────────►│ Core.handle ──► effects ──► replies, jobs, descriptors
    copier ──Backed/Copied─────────────►┘
"""

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from kvd import __version__, log, reports
from kvd.core import events
from kvd.core.accounting import report_of_sequences
from kvd.core.cache import Limits
from kvd.core.machine import Core
from kvd.instance import InstanceLock
from kvd.notify import Notifier
from kvd.sessions import Sessions
from kvd.settings import Settings
from kvd.store import Store
from kvd_proto import codec
from kvd_proto.errors import BadMessage, InternalError, KvdError
from kvd_proto.messages import (
    ListClients,
    ListSequences,
    Ping,
    Pong,
    Reported,
    Status,
    Verify,
)
from kvd_proto.paths import LIFELINE_SOCKET, REQUESTS_SOCKET

BURST = 256
"""Requests that are answered before the other descriptors get their turn."""


class Server:
    """One daemon. `run` serves until a signal or `stop`; `close` removes every trace of it."""

    def __init__(self, settings: Settings, lock: InstanceLock, notifier: Notifier) -> None:
        """Bind the sockets. The lock is held by the caller, who releases it after `close`."""
        self._settings = settings
        self._notifier = notifier
        self._started = time.monotonic()
        self._last_client = self._started
        self._stopping = False
        # 2^63 ids are enough for every start to have a range of its own.
        first_context = int.from_bytes(os.urandom(7), "little") << 7 | 1
        self.core = Core(
            Limits(
                settings.max_memory,
                settings.max_sequences,
                settings.max_sessions,
                settings.n_seq_max,
                first_context,
            )
        )
        self.store = Store(lock.segment_name)
        self._poller = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._waiting_reports: list[tuple[bytes, int, Any]] = []
        self._requests_path = lock.runtime_dir / REQUESTS_SOCKET
        self._router = _bind(self._requests_path)
        self.sessions = Sessions(
            lock.runtime_dir / LIFELINE_SOCKET,
            settings.instance,
            self.store,
            self.handle,
            self.watch,
            self.unwatch,
        )
        self.watch(int(self._router.getsockopt(zmq.FD)), select.EPOLLIN, lambda _: None)
        self.watch(self.store.event_fd, select.EPOLLIN, lambda _: self._jobs_ended())

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        """Call `handler` with the events whenever `fd` has some of `mask`; again to change it."""
        if fd in self._handlers:
            self._poller.modify(fd, mask)
        else:
            self._poller.register(fd, mask)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor, before it is closed."""
        del self._handlers[fd]
        self._poller.unregister(fd)

    def stop(self) -> None:
        """Let `run` return after the request at hand. Safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous_fd = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        previous = {
            number: signal.signal(number, lambda *_: self.stop())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        self.watch(wake_read, select.EPOLLIN, lambda _: None)
        self._notifier.ready()
        try:
            while not self._stopping:
                busy = self._serve_requests()
                for fd, mask in self._poller.poll(0 if busy else self._timeout()):
                    handler = self._handlers.get(fd)
                    if handler is not None:
                        handler(mask)
                self._tick()
        finally:
            self._notifier.stopping()
            self.unwatch(wake_read)
            for number, former in previous.items():
                signal.signal(number, former)
            signal.set_wakeup_fd(previous_fd)
            os.close(wake_read)
            os.close(wake_write)

    def close(self) -> None:
        """Close sockets and sessions, unmap and remove the segments."""
        self.sessions.close()
        self._router.close(linger=0)
        self._requests_path.unlink(missing_ok=True)
        self._router.context.term()
        self.store.close()
        self._poller.close()

    # --- events in, effects out

    def handle(self, event: events.Event) -> None:
        """Give the core an event and carry out what it asks."""
        self._apply(self.core.handle(event, time.monotonic()))

    def _apply(self, effects: list[events.Effect]) -> None:
        store = self.store
        for effect in effects:
            match effect:
                case events.Reply(session, correlation, body):
                    self._reply(session, correlation, body)
                case events.Completed(session, commit):
                    store.stagings[session].set_completed(commit)
                case events.WriteRecord():
                    store.write_record(effect)
                case events.DropRecord():
                    store.drop_record(effect)
                case events.Copy():
                    store.copy(effect)
                case events.Back():
                    ended = store.back(effect)
                    if ended is not None:
                        self.handle(ended)
                case events.Punch():
                    store.punch(effect)
                case events.CreateArena():
                    self._create_arena(effect)
                    log.info("model registered", model=effect.name, stride=effect.stride_bytes)
                case events.ShareArena(session, arena):
                    self.sessions.share(session, arena)
                case events.OpenStaging(session, n_bytes):
                    self.sessions.welcome(session, n_bytes)
                case events.RefuseSession(session, error):
                    self.sessions.refuse(session, error)
                case events.CloseStaging(session):
                    store.close_staging(session)

    def _create_arena(self, effect: events.CreateArena) -> None:
        try:
            self.store.create_arena(effect)
        except KvdError:
            # The request at hand fails with it, and what else it asked for is not done.
            self.handle(events.ArenaFailed(effect.arena))
            raise

    # --- requests

    def _serve_requests(self) -> bool:
        """Answer what has come in; whether there may be more."""
        for _ in range(BURST):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._serve(frames)
        return True

    def _serve(self, frames: list[bytes]) -> None:
        session = frames[0]
        try:
            if len(frames) != 2:
                raise BadMessage("a request is exactly one frame", frames=len(frames) - 1)
            correlation, message = codec.decode_request(frames[1])
        except BadMessage as error:
            known = error.details.pop("correlation", 0)
            self._reply(session, known if isinstance(known, int) else 0, error)
            return
        try:
            if isinstance(message, Ping):
                self._reply(session, correlation, self._pong())
            elif isinstance(message, Status | ListSequences | ListClients | Verify):
                self._waiting_reports.append((session, correlation, message))
                self._give_reports()
            else:
                staging = self.store.stagings.get(session)
                view = staging.buffer if staging is not None else None
                self.handle(events.Requested(session, correlation, message, view))
        except KvdError as error:
            self._reply(session, correlation, error)
        except Exception as error:  # a fault of ours: the caller must hear of it, and so must we
            log.exception("request failed", operation=type(message).__name__)
            self._reply(session, correlation, InternalError(f"{type(error).__name__}: {error}"))

    def _reply(self, session: bytes, correlation: int, body: Any) -> None:
        if isinstance(body, KvdError):
            frame = codec.encode_error(correlation, body)
        else:
            frame = codec.encode_reply(correlation, body)
        try:
            self._router.send_multipart([session, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: it has gone. EAGAIN: it does not read, and 1,000 replies wait for it.
            log.debug("reply dropped", session=session.hex()[:8], reason=error.strerror)

    def _pong(self) -> Pong:
        uptime = int((time.monotonic() - self._started) * 1000)
        return Pong(__version__, self._settings.instance, os.getpid(), uptime)

    # --- reports wait until no job is under way

    def _give_reports(self) -> None:
        if not self._waiting_reports or not self.store.hold():
            return
        waiting, self._waiting_reports = self._waiting_reports, []
        for session, correlation, message in waiting:
            try:
                self._reply(session, correlation, Reported(self._report(message)))
            except Exception as error:
                log.exception("report failed", operation=type(message).__name__)
                self._reply(session, correlation, InternalError(f"{type(error).__name__}: {error}"))
        self.store.go_on()

    def _report(self, message: Any) -> dict[str, Any]:
        cache, now = self.core.cache, time.monotonic()
        match message:
            case ListSequences():
                return {"sequences": report_of_sequences(cache, now)}
            case ListClients():
                return reports.clients(cache, now)
            case Verify():
                return reports.verify(cache, self.store)
        return reports.status(cache, self.store, self._settings.instance, now - self._started)

    # --- time and jobs

    def _jobs_ended(self) -> None:
        for event in self.store.ended():
            self.handle(event)
        self._give_reports()

    def _tick(self) -> None:
        now = time.monotonic()
        deadline = self.core.next_deadline()
        if deadline is not None and deadline <= now:
            self._apply(self.core.handle(events.Ticked(), now))
        self.sessions.expire_handshakes(now)
        if self.core.cache.sessions:
            self._last_client = now
        linger = self._settings.linger_seconds
        if linger and now - self._last_client >= linger:
            log.info("stopping", reason="no client for linger_seconds")
            self.stop()

    def _timeout(self) -> float:
        """Seconds until something is due; -1 for never."""
        now = time.monotonic()
        due = [self.core.next_deadline(), self.sessions.next_deadline()]
        if self._settings.linger_seconds and not self.core.cache.sessions:
            due.append(self._last_client + self._settings.linger_seconds)
        times = [max(0.0, when - now) for when in due if when is not None]
        return min(times, default=-1)


def _bind(path: Path) -> "zmq.Socket[bytes]":
    """The request socket, for this user alone; the caller holds the instance's lock."""
    router = zmq.Context().socket(zmq.ROUTER)
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
    return router
