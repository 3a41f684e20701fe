"""The daemon's loop: sockets in and out, the core in the middle, the store on the other side.

One thread, one epoll.

    lifeline ──Connected/Disconnected──►┐
    ROUTER ──decoded Requested─────────►│ Core.handle ──► effects ──► replies, jobs, descriptors
    copier ──Backed/Copied─────────────►┘

What goes wrong: what a client did, and memory that is not there, are errors of kvd_proto, and an
answer. Any other exception is a fault of ours, and is logged with its trace. The request that met
it is answered with InternalError. If it was in a report, nothing has changed, and the daemon goes
on. If it was in the core, everything is recounted, and the daemon goes on only if it agrees. If it
was in an event without a request, or in carrying out effects, the daemon ends, since nobody knows
what did not happen. Ending is safe: clients notice at once, and go on by themselves; to serve K/V
from a cache that is not what it says would not be.
"""

import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from kvd import __version__, adoption, advice, audit, descriptors, log, reports, timing
from kvd.configuration import Configuration
from kvd.core import events, pins
from kvd.core.cache import Limits
from kvd.core.histogram import Histogram
from kvd.core.machine import Core
from kvd.following import Followers
from kvd.instance import InstanceLock
from kvd.limits import longest_segment
from kvd.metrics import listening, snapshot
from kvd.metrics.questions import Kind, Question
from kvd.notify import Notifier
from kvd.reloading import Reloading
from kvd.reporter import REPORTS, Reporter
from kvd.requests import Incoming, Requests
from kvd.sessions import Sessions
from kvd.settings import MOST_MEMORY, Settings
from kvd.signals import Signals
from kvd.store import Store
from kvd.tenants import Tenants
from kvd.warming import Warming
from kvd_proto.codec import MAX_MESSAGE_BYTES
from kvd_proto.errors import InternalError, KvdError
from kvd_proto.messages import Append, Config, Events, Ping, Pong, Reload, Reported
from kvd_proto.paths import LIFELINE_SOCKET, REQUESTS_SOCKET

if TYPE_CHECKING:
    from kvd.metrics.service import Metrics

BURST_SECONDS = 0.002
"""Requests are served for so long before the other descriptors get their turn."""
READERS_SECONDS = 0.25
"""Between two looks for readers of a former life, as long as there are any."""
LONGEST_WAIT = 3600.0
"""Seconds at once: epoll takes an int of milliseconds, and a pin may end in a year."""
STATUS_SECONDS = 5.0
"""The least time between two status lines for the service manager."""


class Server:
    """One daemon. `run` serves until it is told to stop; `close` removes every trace of it."""

    def __init__(
        self,
        configuration: Configuration,
        load: Callable[[], Configuration],
        lock: InstanceLock,
        notifier: Notifier,
    ) -> None:
        """Bind the sockets. The lock is held by the caller, who releases it after `close`. `load`
        reads the configuration again, in another thread.

        Raises OSError or zmq.ZMQError, leaving nothing behind.
        """
        settings = self._settings = configuration.settings
        self._notifier = notifier
        self._started = self._last_client = time.monotonic()
        self._stopping = False
        self._unfinished = False
        """Jobs have ended that are not followed up yet."""
        self._events: deque[events.Event] = deque()
        self._next_watchdog = -math.inf if notifier.watchdog_interval else math.inf
        self._next_status = math.inf
        self._next_readers = -math.inf
        self._is_over = False
        """Whether the budget or a quota is to be smaller than it is yet."""
        tenants = Tenants(settings.tenants, settings.max_memory, settings.max_staging)
        # 2^63 ids are enough for every start to have a range of its own.
        first_context = int.from_bytes(os.urandom(7), "little") << 7 | 1
        self._limits = limits_of(settings, tenants, first_context, longest_segment())
        self.core = Core(self._limits)
        self.evicting = Histogram(timing.BOUNDS)
        """Seconds of the loop for events in which the core evicted something."""
        with ExitStack() as opened:
            self._poller = opened.enter_context(select.epoll())
            self._handlers: dict[int, Callable[[int], None]] = {}
            self._unwatched: set[int] = set()
            self.store = Store(lock.segment_name, self.handle)
            opened.callback(self._close_store)
            self._adopt(lock, tenants)
            group = settings.socket_group
            self._requests = Requests(lock.runtime_dir / REQUESTS_SOCKET, group, self._reply_lost)
            opened.callback(self._requests.close)
            self._reporter = Reporter(
                self.core.cache,
                self.store,
                settings.instance,
                self._requests.reply,
                has_tenants=bool(settings.tenants),
            )
            self._followers = Followers(self.core.cache, self._requests.reply)
            self.sessions = Sessions(
                lock.runtime_dir / LIFELINE_SOCKET,
                group,
                settings.instance,
                self.store,
                tenants,
                self.handle,
                self.watch,
                self.unwatch,
            )
            opened.callback(self.sessions.close)
            self._warming = Warming(
                settings.warm,
                pins.owners(self.core.cache),
                settings.instance,
                lock.runtime_dir,
                self.watch,
                self.unwatch,
            )
            opened.callback(self._warming.close)
            self._metrics = self._serve_metrics(lock, opened)
            self._reloading = Reloading(
                configuration,
                load,
                self._reconfigure,
                lambda: self.core.cache.budget,
                lambda session: self._reporter.whose(session) is None,
                self._requests.reply,
                notifier,
            )
            opened.callback(self._reloading.close)
            self._opened = opened.pop_all()
        # Only to wake up: the loop looks into the request socket each time.
        self.watch(self._requests.fd, select.EPOLLIN, lambda _: None)
        self.watch(self.store.event_fd, select.EPOLLIN, lambda _: self._finish_jobs())
        if self._metrics is not None:
            self.watch(self._metrics.questions.fd, select.EPOLLIN, lambda _: self._tell_metrics())
            self._metrics.start()
        self.watch(self._reloading.fd, select.EPOLLIN, lambda _: self._reloading.finish())

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
        self._unwatched.add(fd)

    def stop(self) -> None:
        """Let `run` return when it has done what it is at."""
        self._stopping = True

    def run(self, signals: Signals) -> None:
        """Serve until a signal says so or `stop` was called. Raises what went wrong beyond
        repair."""
        self.watch(signals.fd, select.EPOLLIN, lambda _: self._signalled(signals))
        if self._notifier.ready():
            self._next_status = self._started
        self._warming.begin_next()
        while not self._stopping:
            more = self._serve_requests()
            wait = self._tick()
            self._dispatch(0.0 if more or self._unfinished else wait)
            if self._unfinished:
                self._finish_jobs()

    def close(self) -> None:
        """Close sockets and sessions, finish jobs, unmap and remove the segments."""
        self._notifier.stopping()
        self._opened.close()

    def _adopt(self, lock: InstanceLock, tenants: Tenants) -> None:
        """Take over what an earlier daemon left. Whatever that is, it never keeps us from
        starting."""
        found: list[adoption.Found] = []
        try:
            found += adoption.find(lock, tenants.names)
            for number, each in enumerate(found, 1):
                self.store.find_arena(number, each)
                self.handle(each.event(number))
        except Exception as error:
            log.error("cold start", error)
            self._events.clear()
            self.store.close(keep_arenas=False)
            for each in found:  # those that the store has not got yet would keep their memory
                each.segment.close(unlink=True)
                each.directory.close(unlink=True)
            lock.sweep()
            self.core = Core(self._limits)
            self.store = Store(lock.segment_name, self.handle)

    def _serve_metrics(self, lock: InstanceLock, opened: ExitStack) -> "Metrics | None":
        """Listen for who asks for metrics, if anybody may."""
        # With tenants a member of the group sees no other's; and metrics are of all.
        group = None if self._settings.tenants else self._settings.socket_group
        listeners = listening.listen(self._settings.metrics, lock.runtime_dir, group)
        if not listeners:
            return None
        # Not above: it needs prometheus_client, which is an extra.
        from kvd.metrics.service import Metrics

        metrics = Metrics(listeners)
        opened.callback(metrics.close)
        return metrics

    def _signalled(self, signals: Signals) -> None:
        if signals.take():
            self.stop()
        else:
            self._reloading.begin()

    def _reconfigure(self, settings: Settings) -> None:
        """Let settings be in effect, of which no other has changed than may."""
        if not self._settings.linger_seconds:
            self._last_client = time.monotonic()
        self._settings = settings
        log.set_level(settings.log_level)
        descriptors.raise_limit(settings)
        tenants = Tenants(settings.tenants, settings.max_memory, settings.max_staging)
        self.sessions.tenants = tenants
        limits = self._limits
        self._limits = limits_of(settings, tenants, limits.first_context, limits.arena_bytes)
        before = self.core.cache.limits
        self.handle(events.Reconfigured(self._limits))
        if before.max_memory != settings.max_memory or before.tenants != self._limits.tenants:
            for stored in self.store.arenas.values():
                self._warn_of_size(stored.arena)

    def _close_store(self) -> None:
        """The core may have been changed by what went wrong, but what it left in shared memory is
        checked by whoever adopts it."""
        keep = self._settings.keep_on_stop
        n_bytes = sum(stored.segment.backed_bytes() for stored in self.store.arenas.values())
        self.store.close(keep_arenas=keep)
        if keep and n_bytes:
            remove_with = f"kvd purge --instance {self._settings.instance}"
            log.info("kept for the next start", n_bytes=n_bytes, remove_with=remove_with)

    def _dispatch(self, wait: float) -> None:
        """Wait for descriptors, `wait` seconds at most (-1: for ever), and call their handlers."""
        for fd, mask in self._poller.poll(wait):
            # A handler before this one may have closed the descriptor, and another may have got its
            # number. Whatever happened to that one is reported again.
            if fd not in self._unwatched:
                self._handlers[fd](mask)
        self._unwatched.clear()

    def _finish_jobs(self) -> None:
        self._unfinished = self.store.finish_jobs()

    # --- events in, effects out

    def handle(self, event: events.Event) -> None:
        """Give the core an event and carry out what it asks. One that comes up meanwhile is handled
        after that, so effects are carried out in the core's order."""
        self._events.append(event)
        if len(self._events) > 1:
            return
        while self._events:
            self._apply(self._decide(self._events[0]))
            self._events.popleft()

    def _decide(self, event: events.Event) -> list[events.Effect]:
        """The core's answer to an event. If it fails: see the module's docstring."""
        now = time.monotonic()
        budget = self.core.cache.budget
        evictions = budget.evictions
        try:
            effects = self.core.handle(event, now)
        except Exception as error:
            if not isinstance(event, events.Requested):
                raise
            log.error("request failed", error, operation=type(event.message).__name__)
            fault = InternalError(f"{type(error).__name__}: {error}")
            self._requests.reply(event.session, event.correlation, fault)
            differences = audit.recount_at_once(self.core.cache, self.store)
            if differences:
                log.error("recount disagrees", differences="; ".join(differences))
                raise
            return []
        if budget.evictions != evictions:
            self.evicting.observe(time.monotonic() - now)
        return effects

    def _apply(self, effects: list[events.Effect]) -> None:
        store = self.store
        for effect in effects:
            match effect:  # in the order of how often they come
                case events.Reply(session, correlation, body):
                    self._requests.reply(session, correlation, body)
                case events.Completed(session, commit):
                    store.set_completed(session, commit)
                case events.WriteRecord():
                    store.write_record(effect)
                case events.UseRecord():
                    store.use_record(effect)
                case events.DropRecord():
                    store.drop_record(effect)
                case events.Copy():
                    store.copy(effect)
                case events.WritePin():
                    store.write_pin(effect)
                case events.RenewPin():
                    store.renew_pin(effect)
                case events.DropPin():
                    store.drop_pin(effect)
                case events.Back():
                    store.back(effect)
                case events.BackPins():
                    store.back_pins(effect)
                case events.Punch():
                    store.punch(effect)
                case events.Check():
                    store.check(effect)
                case events.BlocksDamaged(arena, blocks):
                    log.error("damaged blocks", model=store.arenas[arena].arena.name, blocks=blocks)
                case events.ArenaAdopted():
                    store.adopt_arena(effect)
                    self._warn_of_size(store.arenas[effect.arena].arena)
                case events.ArenaRefused(arena, reason):
                    log.warning("cold start", arena=arena, reason=reason)
                    store.refuse_arena(arena)
                case events.CreateArena():
                    if not self._create_arena(effect, effects[-1]):
                        return
                case events.RemoveArena(arena):
                    store.remove_arena(arena)
                case events.ShareArena(session, arena):
                    self.sessions.share(session, arena)
                case events.OpenStaging(session, n_bytes):
                    self.sessions.open(session, n_bytes)
                case events.RefuseSession(session, error):
                    self.sessions.refuse(session, error)
                case events.CloseStaging(session):
                    store.close_staging(session)
                    self._requests.times.forget(session)

    def _create_arena(self, effect: events.CreateArena, answer: events.Effect) -> bool:
        """Make an arena. False if there is no memory for it: then `answer`, the reply that would
        follow, is an error, and what would come before it is not done."""
        try:
            self.store.create_arena(effect)
        except KvdError as error:
            self.handle(events.ArenaFailed(effect.arena))
            assert isinstance(answer, events.Reply)
            self._requests.reply(answer.session, answer.correlation, error)
            return False
        log.info("model registered", model=effect.name, stride=effect.stride_bytes)
        self._warn_of_size(effect)
        return True

    def _warn_of_size(self, arena: events.CreateArena) -> None:
        """Say so if too little of a model fits."""
        needs = advice.Needs(arena.name, arena.block_tokens, arena.stride_bytes)
        quota = self.core.cache.budget.tenant(arena.tenant).quota
        warning = advice.of_model(self._settings, needs, quota)
        if warning is not None:
            log.warning("budget is small", tenant=arena.tenant, reason=warning)

    def _reply_lost(self, session: events.SessionId) -> None:
        self.sessions.give_up(session)

    # --- metrics

    def _tell_metrics(self) -> None:
        """Answer what the metrics' thread has asked."""
        assert self._metrics is not None
        for question in self._metrics.questions.take():
            if question.kind is Kind.ARE_YOU_THERE:
                question.give(None)
            else:
                self._reporter.ask_status(partial(self._tell_how_things_are, question))

    def _tell_how_things_are(self, question: Question, report: Reported | KvdError) -> None:
        if isinstance(report, Reported):
            cache, times = self.core.cache, self._requests.times
            question.give(snapshot.take(report, cache, times, self.evicting, self._settings))
        else:
            question.give(report)

    # --- requests

    def _serve_requests(self) -> bool:
        """Answer what has come in; whether there may be more."""
        times = self._requests.times
        until = time.monotonic() + BURST_SECONDS
        while (incoming := self._requests.receive()) is not None:
            times.begin(*incoming)
            self._serve(incoming)
            times.finish()
            if not self._requests.pending():
                return False
            if time.monotonic() >= until:
                return True
        return False

    def _serve(self, incoming: Incoming) -> None:
        session, correlation, message = incoming
        kind = type(message)
        if kind is Append:
            buffer = self.store.staging_buffer(session)
            self.handle(events.Requested(session, correlation, message, buffer))
        elif kind in REPORTS:
            self._reporter.answer(incoming)
        elif kind is Events:
            self._followers.ask(incoming)
        elif kind is Config or kind is Reload:
            self._reloading.answer(incoming)
        elif kind is Ping:
            self._requests.reply(session, correlation, self._pong())
        elif isinstance(message, KvdError):
            self._requests.reply(session, correlation, message)
        else:
            self.handle(events.Requested(session, correlation, message))

    def _pong(self) -> Pong:
        uptime = int((time.monotonic() - self._started) * 1000)
        return Pong(__version__, self._settings.instance, os.getpid(), uptime)

    # --- time

    def _tick(self) -> float:
        """Do what is due; returns for how many seconds the loop may wait, -1 for ever."""
        if self._reporter.is_walking:
            self._reporter.walk_some()
        now = time.monotonic()
        self._watch_size()
        deadline = self.core.next_deadline()
        if deadline is None:
            deadline = math.inf
        elif deadline <= now:
            self.handle(events.Ticked())
            # It may have used the request socket, so there is no waiting. But the rest has its
            # turn: there are clients of whose requests one is due each time.
        due = min(
            deadline,
            self.sessions.expire_handshakes(now),
            self._give_signs(now),
            self._linger(now),
            self._look_for_readers(now),
            self._followers.look(now),
        )
        if self._reporter.is_walking:
            return 0.0
        return -1 if due == math.inf else min(max(0.0, due - now), LONGEST_WAIT)

    def _watch_size(self) -> None:
        """Say when a budget or a quota that was made smaller has been reached."""
        is_over = self.core.cache.budget.is_over
        if self._is_over and not is_over:
            log.info("smaller budget reached", n_bytes=self.core.cache.budget.n_bytes)
        self._is_over = is_over

    def _give_signs(self, now: float) -> float:
        """Send the watchdog's sign of life and the status line if they are due; returns when the
        next one is."""
        interval = self._notifier.watchdog_interval
        if interval and now >= self._next_watchdog:
            self._notifier.watchdog()
            self._next_watchdog = now + interval
        if now >= self._next_status:
            self._notifier.status(reports.line(self.core.cache))
            self._next_status = now + STATUS_SECONDS
        return min(self._next_watchdog, self._next_status)

    def _look_for_readers(self, now: float) -> float:
        """Ask from time to time whether clients of an earlier daemon can still read its arenas;
        returns when the next time is."""
        if not self.store.has_former_readers:
            return math.inf
        if now >= self._next_readers:
            self._next_readers = now + READERS_SECONDS
            for arena in self.store.find_readers_gone():
                self.handle(events.ReadersGone(arena))
        return self._next_readers

    def _linger(self, now: float) -> float:
        """Stop when no client has been there for linger_seconds; returns when that will be."""
        linger = self._settings.linger_seconds
        if not linger:
            return math.inf
        if self.core.cache.sessions:
            self._last_client = now
            return math.inf
        if now >= self._last_client + linger:
            log.info("stopping", reason="no client for linger_seconds")
            self.stop()
        return self._last_client + linger


def limits_of(settings: Settings, tenants: Tenants, first_context: int, arena_bytes: int) -> Limits:
    """What of the settings the core must know. Arenas are as long as the system may ever give them,
    so that the budget can become larger while they are used."""
    return Limits(
        settings.max_memory,
        settings.max_sequences,
        settings.max_sessions,
        settings.n_seq_max,
        first_context,
        tenants=tenants.rules,
        models=settings.models,
        arena_bytes=min(arena_bytes, MOST_MEMORY),
        max_models=settings.max_models,
        max_pins=settings.max_pins,
        session_models=settings.max_session_models,
        session_contexts=settings.max_contexts,
        session_sequences=settings.session_sequences,
        session_waiting=settings.max_waiting,
        session_waiting_bytes=MAX_MESSAGE_BYTES,
        session_commits=settings.max_commits,
        session_reserved=settings.session_reserved,
    )
