"""The one mutator: an event goes in, effects come out. The rules themselves: see the package.

Nothing raises out of `handle` for what a client did: it becomes an error reply. An AssertionError
is a fault of ours and does come out.
"""

import math
from typing import Any

from kvd.core import (
    adopting,
    allocating,
    checking,
    explaining,
    forgetting,
    models,
    pinning,
    resizing,
    storing,
    tasks,
)
from kvd.core.budget import Budget
from kvd.core.cache import (
    AllocBacking,
    AppendBacking,
    Cache,
    Checking,
    Copying,
    Counters,
    Eviction,
    Limits,
    PinsGrowing,
)
from kvd.core.commits import withdraw
from kvd.core.events import (
    ArenaFailed,
    ArenaFound,
    Backed,
    Checked,
    CloseStaging,
    Connected,
    Copied,
    Disconnected,
    Effect,
    Event,
    OpenStaging,
    ReadersGone,
    Reconfigured,
    RefuseSession,
    Reply,
    Requested,
    Ticked,
    TurnedAway,
)
from kvd.core.holds import WALK_BLOCKS
from kvd.core.sequences import Session, State
from kvd.core.tenants import Tenant
from kvd_proto.errors import KvdError, TooManySessions, UnknownSession
from kvd_proto.happenings import Kind
from kvd_proto.messages import (
    Alloc,
    Append,
    CloseContext,
    Evict,
    Evicted,
    Explain,
    Flush,
    Forget,
    Get,
    KeepAlive,
    OpenContext,
    Pin,
    RegisterModel,
    Release,
    Unpin,
)

EVICT_BLOCKS = 128
"""Dropped at once, in about a millisecond, before others get their turn."""


class Core:
    """The cache's rules over one `Cache`."""

    def __init__(self, limits: Limits) -> None:
        self.cache = Cache(
            limits,
            Budget(limits.max_memory, limits.tenants, limits.models),
            next_context=limits.first_context,
        )

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Let `event` happen at time `now` (seconds, never going back). Mutates the cache."""
        effects: list[Effect] = []
        cache = self.cache
        cache.budget.allowance = WALK_BLOCKS
        cache.budget.journal.now = now
        if now >= cache.budget.ages.due:
            cache.budget.begin_moment(now)
        match event:
            case Requested():
                self._request(event, now, effects)
                if cache.budget.is_over:
                    resizing.settle(cache.budget)
                return effects
            case Connected():
                self._connect(event, now, effects)
            case Disconnected():
                self._disconnect(event, now, effects)
            case TurnedAway(client, pid, uid, error):
                values = (client, pid, uid, error.code, error.message)
                cache.budget.journal.note(Kind.SESSION_REFUSED, "", "", *values)
            case Backed(number):
                job = cache.jobs.pop(number)
                if isinstance(job, AllocBacking):
                    allocating.reserve_backed(cache, job, event, effects)
                    allocating.serve_waiters(cache, now, effects)
                elif isinstance(job, AppendBacking):
                    storing.append_backed(cache, job, event, effects)
                elif isinstance(job, PinsGrowing):
                    pinning.grown(cache, job, event, now, effects)
            case Copied(number):
                copying = cache.jobs.pop(number)
                assert isinstance(copying, Copying)
                storing.copied(cache, copying, event, effects)
            case Checked():
                self._checked(event, now, effects)
            case ArenaFound():
                adopting.adopt(cache, event, now, effects)
                checking.check_next(cache, effects)
            case ReadersGone(number):
                cache.budget.readers_gone(cache.budget.arenas[number], effects)
            case ArenaFailed(number):
                models.forget_arena(cache, number)
            case Reconfigured(limits):
                resizing.reconfigure(cache, limits)
                resizing.shrink_some(cache.budget, EVICT_BLOCKS, effects)
                allocating.serve_waiters(cache, now, effects)
            case Ticked():
                allocating.expire(cache, now, effects)
                self._go_on(now, effects)
        # A block that is sealed or fails can finish commits of several sessions.
        for session in cache.sessions.values():
            if session.commits:
                storing.advance_completed(cache, session, effects)
        self._let_leave(effects)
        if cache.budget.is_over:
            resizing.settle(cache.budget)
        return effects

    def next_deadline(self) -> float | None:
        """When a `Ticked` is due; None while nothing has a deadline, -inf: at once."""
        cache = self.cache
        if cache.budget.letting_go or cache.openings or cache.evictions or cache.tasks:
            return -math.inf
        if resizing.can_go_on(cache.budget):
            return -math.inf
        return cache.deadlines.next()

    def _go_on(self, now: float, effects: list[Effect]) -> None:
        """A step of what takes long. An eviction comes behind all that ended before it, so that it
        finds that cached."""
        cache = self.cache
        if cache.budget.letting_go:
            cache.budget.let_go_some(effects)
            return
        allocating.open_some(cache, now, effects)
        if cache.evictions:
            self._evict_some(effects)
        elif cache.budget.is_over:
            resizing.shrink_some(cache.budget, EVICT_BLOCKS, effects)
        tasks.work(cache, effects)

    def _evict(
        self, session: Session, correlation: int, message: Evict, effects: list[Effect]
    ) -> None:
        """Of the tenant that is named; of none: of everybody if an administrator asks."""
        cache = self.cache
        whose: Tenant | None = tasks.find_tenant(cache.budget, session, message.tenant)
        if session.administrator and not message.tenant:
            whose = None
        eviction = Eviction(session, correlation, message.model, whose, message.blocks or None)
        cache.evictions.append(eviction)
        self._evict_some(effects)

    def _evict_some(self, effects: list[Effect]) -> None:
        """Go on with the first eviction, for EVICT_BLOCKS blocks."""
        cache = self.cache
        if not cache.evictions or cache.budget.letting_go:
            return
        eviction = cache.evictions[0]
        if eviction.left is None:
            arenas = eviction.tenant.arenas if eviction.tenant else cache.budget.arenas.values()
            eviction.left = sum(arena.cached for arena in arenas)
        some = min(eviction.left, EVICT_BLOCKS)
        before = cache.budget.unassigned
        dropped = cache.budget.evict(eviction.name, some, effects, eviction.tenant)
        eviction.left -= dropped
        eviction.blocks += dropped
        eviction.freed_bytes += cache.budget.unassigned - before
        if dropped < some or not eviction.left or not eviction.session.alive:
            cache.evictions.popleft()
            reply = Evicted(eviction.blocks, eviction.freed_bytes)
            cache.reply(eviction.session, eviction.correlation, reply, effects)

    def _request(self, event: Requested, now: float, effects: list[Effect]) -> None:
        cache = self.cache
        session = cache.sessions.get(event.session)
        if session is None:
            cache.counters.requests += 1
            cache.counters.errors += 1
            error = UnknownSession("the daemon does not know this session")
            effects.append(Reply(event.session, event.correlation, error))
            return
        session.heard = now
        session.counters.requests += 1
        body: Any
        try:
            body = self._answer(session, event, now, effects)
        except KvdError as error:
            # Without its frames: they hold views of the session's staging, which must be closed
            # when the session ends, and `body` among them would keep them in a cycle.
            body = error.with_traceback(None)
        if body is not None:
            cache.reply(session, event.correlation, body, effects)

    def _answer(
        self, session: Session, event: Requested, now: float, effects: list[Effect]
    ) -> object | None:
        """Dispatch; None means that the reply has been given already, or comes later."""
        cache, message, correlation = self.cache, event.message, event.correlation
        # In the order of how often they come.
        match message:
            case Alloc():
                return allocating.alloc(cache, session, correlation, message, now, effects)
            case Append():
                storing.append(cache, session, correlation, message, event.staging, now, effects)
                return None
            case Release():
                return allocating.release(cache, session, message, now, effects)
            case Get():
                return allocating.get(cache, session, message, now)
            case KeepAlive():
                return allocating.keep_alive(cache, session, message, now)
            case Flush():
                return storing.flush(cache, session, correlation, message)
            case RegisterModel():
                return models.register_model(cache, session, message, effects)
            case OpenContext():
                return models.open_context(cache, session, message, now)
            case CloseContext():
                return models.close_context(cache, session, message, now, effects)
            case Pin():
                return pinning.pin(cache, session, correlation, message, now, effects)
            case Unpin():
                return pinning.unpin(cache, session, message, effects)
            case Evict():
                self._evict(session, correlation, message, effects)
                return None
            case Explain():
                steps = explaining.explain(cache, session, message)
                tasks.begin(cache, session, correlation, steps, effects)
                return None
            case Forget():
                steps = forgetting.forget(cache, session, message)
                tasks.begin(cache, session, correlation, steps, effects)
                return None
        raise AssertionError(f"the shell answers {type(message).__name__}, not the core")

    def _checked(self, event: Checked, now: float, effects: list[Effect]) -> None:
        """A check has ended: requests that waited for it are tried again."""
        cache = self.cache
        job = cache.jobs.pop(event.job)
        assert isinstance(job, Checking)
        checking.checked(cache, job, event, effects)
        cache.openings.extend(job.openings)
        for session, correlation, message in job.deferred:
            allocating.waits_no_longer(session, message)
            body: Any
            try:
                if isinstance(message, Alloc):
                    body = allocating.alloc(cache, session, correlation, message, now, effects)
                else:
                    body = pinning.pin(cache, session, correlation, message, now, effects)
            except KvdError as error:
                body = error
            if body is not None:
                cache.reply(session, correlation, body, effects)
        checking.check_next(cache, effects)

    def _connect(self, event: Connected, now: float, effects: list[Effect]) -> None:
        cache = self.cache
        assert event.session not in cache.sessions, "the shell gave a session's id twice"
        assert event.session not in cache.leaving, "the shell gave a session's id twice"
        tenant = cache.budget.tenant(event.tenant)
        try:
            if len(cache.sessions) >= cache.limits.max_sessions:
                raise TooManySessions(
                    "too many clients are connected", max_sessions=cache.limits.max_sessions
                )
            cache.budget.charge_staging(tenant, event.staging_bytes, effects)
        except KvdError as error:
            values = (event.client, event.pid, event.uid, error.code, error.message)
            cache.budget.journal.note(Kind.SESSION_REFUSED, tenant.name, "", *values)
            effects.append(RefuseSession(event.session, error))
            return
        counters = cache.counters_of.setdefault(tenant.name, Counters())
        cache.sessions[event.session] = Session(
            event.session,
            event.client,
            event.pid,
            event.uid,
            tenant,
            event.administrator,
            counters,
            event.staging_bytes,
            connected=now,
            heard=now,
        )
        counters.sessions_opened += 1
        cache.budget.journal.note(
            Kind.SESSION_OPENED,
            tenant.name,
            "",
            event.client,
            event.pid,
            event.uid,
            event.session.hex()[:8],
            event.staging_bytes,
        )
        effects.append(OpenStaging(event.session, event.staging_bytes))

    def _disconnect(self, event: Disconnected, now: float, effects: list[Effect]) -> None:
        """Give back all that the session held. What it has committed stays and is finished."""
        cache = self.cache
        session = cache.sessions.pop(event.session, None)
        if session is None:
            return
        session.alive = False
        cache.budget.journal.note(
            Kind.SESSION_GONE,
            session.tenant.name,
            "",
            session.client,
            session.pid,
            session.id.hex()[:8],
            event.reason,
            session.open_sequences,
            round(now - session.connected, 3),
        )
        if cache.unchecked:
            allocating.forget_deferred(cache, session)
        for context in list(session.contexts.values()):
            models.drop_context(cache, context, State.FAILED, effects)
        models.leave_models(cache, session)
        for commit in session.commits.values():
            withdraw(commit)
        cache.leaving[session.id] = session
        self._let_leave(effects)  # before others ask for room
        allocating.serve_waiters(cache, now, effects)

    def _let_leave(self, effects: list[Effect]) -> None:
        """Close the staging of dead sessions that no copy reads any more."""
        for session in list(self.cache.leaving.values()):
            if session.in_flight == 0:
                del self.cache.leaving[session.id]
                self.cache.budget.return_staging(session.tenant, session.staging_bytes)
                effects.append(CloseStaging(session.id))
