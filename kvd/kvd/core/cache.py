"""The state of the core in one place, and what several operations share. The operations: models.py,
allocating.py, storing.py, pinning.py; the dispatch: machine.py.
"""

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from kvd.core.arenas import Arena
from kvd.core.budget import Budget
from kvd.core.commits import Commit
from kvd.core.deadlines import Deadlines
from kvd.core.events import Effect, Reply, SessionId
from kvd.core.sequences import Context, Opening, Sequence, Session, Waiter
from kvd.core.shares import ModelRule
from kvd.core.tenants import Tenant, TenantRule
from kvd.core.tree import Block
from kvd_proto.errors import KvdError
from kvd_proto.happenings import Kind
from kvd_proto.messages import Alloc, Pin

NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration says that the core must know. Bytes and counts."""

    max_memory: int
    max_sequences: int = 100
    max_sessions: int = 256
    n_seq_max: int = 8
    first_context: int = 1
    """Contexts are numbered from here: the shell gives each start of the daemon another range, so
    that a handle from before a restart cannot name a context of today."""
    tenants: tuple[TenantRule, ...] = ()
    """Those that have a quota, a minimum or a salt."""
    models: tuple[ModelRule, ...] = ()
    """Those that have a minimum or a cap."""
    arena_bytes: int = 0
    """New arenas are so long, and at least as the budget, so that this may become larger."""
    max_models: int = NO_LIMIT
    """Of one tenant. One more takes the place of an arena that nobody uses."""
    max_pins: int = 1000
    """Of one tenant; at most MAX_PINS of kvd_proto.layout."""
    # What one session may have, so that it leaves something to others.
    session_models: int = NO_LIMIT
    session_contexts: int = NO_LIMIT
    session_sequences: int = NO_LIMIT
    session_waiting: int = NO_LIMIT
    """Allocs that wait for an id, or for what an earlier daemon left to be checked."""
    session_waiting_bytes: int = NO_LIMIT
    """Of their tokens, which the daemon keeps meanwhile."""
    session_commits: int = NO_LIMIT
    """That are not finished; and flushes that wait for them."""
    session_reserved: int = NO_LIMIT
    """Bytes set aside for appends to come."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, for status and metrics. Tokens where they say so."""

    requests: int = 0
    errors: int = 0
    """Requests that were answered with an error, at once or later."""
    queried_tokens: int = 0
    hit_tokens: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    present_blocks: int = 0
    joined_blocks: int = 0
    failed_blocks: int = 0
    sequences_opened: int = 0
    sequences_failed: int = 0
    """By their owner's word, when it released them."""
    sequences_timed_out: int = 0
    sequences_not_matched: int = 0
    """Whose alloc asked that nothing is matched."""
    sequences_not_stored: int = 0
    """Whose alloc asked that nothing is stored."""
    sessions_opened: int = 0
    adopted_blocks: int = 0
    """That an earlier daemon had left."""
    damaged_blocks: int = 0
    """Adopted ones whose bytes did not have their checksum."""


def sum_of(counters: Iterable[Counters]) -> Counters:
    """Their totals."""
    total = Counters()
    for each in counters:
        for field_ in fields(Counters):
            name = field_.name
            setattr(total, name, getattr(total, name) + getattr(each, name))
    return total


class AllocBacking(NamedTuple):
    """An alloc whose reserved slots are being backed."""

    correlation: int
    sequence: Sequence
    slots: list[int]
    to_back: list[int]
    reply: object


class AppendBacking(NamedTuple):
    """An append some of whose slots are being backed. `first` is the first block of all that it
    names, `blocks` are the new ones."""

    correlation: int
    sequence: Sequence
    commit: Commit
    first: Block
    blocks: list[Block]
    to_back: list[int]
    reply: object


class Copying(NamedTuple):
    """A copy job: its blocks in the order of its items, and whose staging it reads."""

    session: Session
    blocks: list[Block]


class WantedPin(NamedTuple):
    """A pin of a sealed block, for so many seconds (0: for ever), and whom to answer. It holds the
    block while it waits."""

    session: Session
    correlation: int
    owner: str
    block: Block
    n_tokens: int
    seconds: float


class PinsGrowing(NamedTuple):
    """The arena's directory gets memory for pins, up to `n_bytes`; who waits for that."""

    arena: Arena
    n_bytes: int
    wanted: list[WantedPin]


class Deferred(NamedTuple):
    """A request that waits until blocks that it may match have been checked."""

    session: Session
    correlation: int
    message: Alloc | Pin


class Checking(NamedTuple):
    """A check of what an earlier daemon left: the blocks in the order of its items, and who waits
    for their end: to begin, or to go on matching."""

    blocks: list[Block]
    deferred: list[Deferred]
    openings: list[Opening]


@dataclass(slots=True, eq=False)
class Eviction:
    """An evict that is under way: `left` blocks to go, at most. None: all that are cached when it
    begins, so that it comes to an end."""

    session: Session
    correlation: int
    name: str
    tenant: Tenant | None
    """Whose blocks; None: everybody's."""
    left: int | None
    blocks: int = 0
    freed_bytes: int = 0


class Task(NamedTuple):
    """What takes long, and whom to answer: see tasks.py."""

    session: Session
    correlation: int
    steps: Generator[None, list[Effect], Any]


Job = AllocBacking | AppendBacking | PinsGrowing | Copying | Checking


@dataclass(slots=True)
class Cache:
    """Everything the core knows."""

    limits: Limits
    budget: Budget
    sessions: dict[SessionId, Session] = field(default_factory=dict)
    leaving: dict[SessionId, Session] = field(default_factory=dict)
    """Dead sessions whose staging is still read by a copy."""
    contexts: dict[int, Context] = field(default_factory=dict)
    waiting: dict[Waiter, None] = field(default_factory=dict)
    """All who wait for an id, in the order of their coming."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    jobs: dict[int, Job] = field(default_factory=dict)
    unchecked: dict[Block, int | None] = field(default_factory=dict)
    """Adopted blocks, parents first, and the job that checks each, if one does already."""
    evictions: deque[Eviction] = field(default_factory=deque)
    """First come, first served."""
    openings: deque[Opening] = field(default_factory=deque)
    """Long allocs take turns."""
    tasks: deque[Task] = field(default_factory=deque)
    """As these do."""
    counters: Counters = field(default_factory=Counters)
    """Of requests without a session. What sessions do is counted for their tenants."""
    counters_of: dict[str, Counters] = field(default_factory=dict)
    """By the tenant's name."""
    open_sequences: int = 0
    timed_out_sequences: int = 0
    """Of the open ones."""
    next_context: int = 0
    next_arena: int = 1
    next_job: int = 1
    next_ticket: int = 1

    def new_job(self, job: Job) -> int:
        """File a job under a new number."""
        number = self.next_job
        self.next_job += 1
        self.jobs[number] = job
        return number

    def reply(self, session: Session, correlation: int, body: Any, effects: list[Effect]) -> None:
        """Answer a request with a message or a KvdError; a session that has ended hears nothing."""
        if session.alive:
            if isinstance(body, KvdError):
                session.counters.errors += 1
                values = (session.client, session.pid, body.code, body.message)
                self.budget.journal.note(Kind.REFUSED, session.tenant.name, "", *values)
            effects.append(Reply(session.id, correlation, body))

    def lease(self, sequence: Sequence, block: Block, effects: list[Effect]) -> None:
        """Move the sequence's lease to `block`, which it holds from now on."""
        self.budget.hold(block)
        if sequence.leased.parent is not None:  # there is nothing to undo of the root
            self.budget.unhold(sequence.leased, effects)
        sequence.leased = block

    def sequences(self) -> list[Sequence]:
        """All open sequences."""
        return [seq for context in self.contexts.values() for seq in context.open.values()]
