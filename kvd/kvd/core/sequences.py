"""Sessions, contexts and sequences: ids, generations, states, who waits. What happens to them:
allocating.py and storing.py.

A sequence handle is (context, seq_id, generation). An id returns to its pool only when its owner
says that the K/V is gone (release) or has died; only then does the next generation use it.

    alloc ──► PENDING ──id free──► PROCESSING ──release──► COMPLETED or FAILED
                 │                      │
              deadline              idle timeout
                 ▼                      ▼
          NO_SEQUENCE_FREE          TIMED_OUT ──release──► gone
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from kvd.core.amounts import Amount
from kvd.core.arenas import Arena
from kvd.core.events import SessionId
from kvd.core.tenants import Tenant
from kvd.core.tree import Block
from kvd_proto.errors import ForeignHandle, StaleHandle, UnknownContext
from kvd_proto.messages import MAX_FAILURES, Alloc

if TYPE_CHECKING:
    from kvd.core.cache import Counters
    from kvd.core.commits import Commit


class State:
    """Of a request for a sequence. One that is PENDING has no id, or is not answered yet.

    Not an Enum: to look a member up in one takes four times as long, and each request does."""

    PENDING: Final = "PENDING"
    PROCESSING: Final = "PROCESSING"
    COMPLETED: Final = "COMPLETED"
    FAILED: Final = "FAILED"
    TIMED_OUT: Final = "TIMED_OUT"


_OPEN = State.PENDING, State.PROCESSING, State.TIMED_OUT


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence that holds an id. `leased` is its deepest block; `tip` its deepest full one.

    Both are the arena's root while there is none. All of a block's ancestors are leased with it.
    The last leased block may hold more tokens than the `length` that the sequence has matched or
    committed.
    """

    context: "Context"
    seq_id: int
    generation: int
    request: str
    tip: Block
    leased: Block
    idle_timeout: float
    touched: float
    length: int = 0
    state: str = State.PROCESSING
    stores: bool = True
    """Whether it takes appends, by the word of its alloc."""
    limit: int | None = None
    """The position before which appends must end, if alloc reserved room."""
    reserved: list[int] = field(default_factory=list)
    """Slots set aside for appends to come."""

    @property
    def is_open(self) -> bool:
        """Whether it holds its id still."""
        return self.state in _OPEN

    @property
    def due(self) -> float | None:
        """When it will have been idle for too long, if nobody asks for it until then."""
        if not self.idle_timeout or self.state is not State.PROCESSING:
            return None
        return self.touched + self.idle_timeout


@dataclass(slots=True, eq=False)
class Context:
    """What stands for one llama.cpp context: a pool of sequence ids of one session for one
    model."""

    number: int
    session: "Session"
    arena: Arena
    free_ids: deque[int]
    generation: int = 0
    open: dict[int, Sequence] = field(default_factory=dict)
    waiting: "dict[Waiter, None]" = field(default_factory=dict)
    """Who waits for one of its ids, first come first."""

    def take_id(self, request: str, idle_timeout: float, now: float) -> Sequence:
        """Hand out the id that has been free longest; there is one."""
        return self.open_id(self.free_ids.popleft(), request, idle_timeout, now)

    def open_id(self, seq_id: int, request: str, idle_timeout: float, now: float) -> Sequence:
        """A new generation of `seq_id`, without blocks."""
        self.generation += 1
        root = self.arena.root
        sequence = Sequence(
            self, seq_id, self.generation, request, root, root, idle_timeout, touched=now
        )
        self.open[seq_id] = sequence
        return sequence

    def give_back(self, sequence: Sequence) -> None:
        """The id's K/V is gone: it may be handed out again."""
        del self.open[sequence.seq_id]
        self.free_ids.append(sequence.seq_id)


@dataclass(slots=True, eq=False)
class Waiter:
    """An alloc that waits for an id. A lower `ticket` came first."""

    ticket: int
    correlation: int
    context: Context
    message: Alloc
    since: float

    @property
    def due(self) -> float | None:
        """Its deadline, while it waits."""
        if self not in self.context.waiting:
            return None
        return self.since + self.message.wait_ms / 1000


@dataclass(slots=True, eq=False)
class Opening:
    """An alloc that has its id and goes on matching: its sequence leases what has matched so far,
    and is PENDING. `slots` are theirs, packed."""

    sequence: Sequence
    correlation: int
    message: Alloc
    slots: list[bytes]


class WaitingFlush(NamedTuple):
    """A flush that waits for the session's completed number to reach `commit`."""

    commit: int
    correlation: int


class Failure(NamedTuple):
    """A commit that failed after its reply: its number, and the error's code and message."""

    commit: int
    code: str
    message: str


@dataclass(slots=True, eq=False)
class Session:
    """A connected client and all that it holds."""

    id: SessionId
    client: str
    pid: int
    uid: int
    tenant: Tenant
    administrator: bool
    """Whether it may see and evict what is other tenants'."""
    counters: "Counters"
    """Its tenant's."""
    staging_bytes: int
    connected: float
    heard: float
    """When its last request came, or its hello."""
    contexts: dict[int, Context] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)
    """Arenas whose descriptor it has been sent."""
    commits: "dict[int, Commit]" = field(default_factory=dict)
    """Those that are not finished, and finished ones behind them, in order."""
    last_commit: int = 0
    completed: int = 0
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=MAX_FAILURES))
    """Until a flush tells of them; the latest ones."""
    flushes: list[WaitingFlush] = field(default_factory=list)
    open_sequences: int = 0
    waiting: int = 0
    """Its allocs that wait for an id, or for a check."""
    waiting_bytes: int = 0
    """Of their tokens."""
    reserved: Amount = field(default_factory=Amount)
    """Set aside for its appends to come."""
    filling: Amount = field(default_factory=Amount)
    """Blocks that are filled from its staging, or will be: it is their first source."""
    tasks: int = 0
    """Of its requests that take long, those under way."""
    alive: bool = True
    in_flight: int = 0
    """Copies that may still read its staging."""


def find_context(session: Session, contexts: dict[int, Context], number: int) -> Context:
    """The session's own context; raises UnknownContext or ForeignHandle."""
    context = session.contexts.get(number)
    if context is not None:
        return context
    other = contexts.get(number)
    if other is not None and other.session.tenant is session.tenant:
        raise ForeignHandle("this context belongs to another session", context=number)
    raise UnknownContext("no such context is open", context=number)


def find_sequence(context: Context, seq_id: int, generation: int) -> Sequence:
    """The open sequence of this handle; raises StaleHandle. Nobody has been told the handle of one
    whose alloc is still under way."""
    sequence = context.open.get(seq_id)
    if sequence is None or sequence.generation != generation or sequence.state is State.PENDING:
        raise StaleHandle(
            "this sequence has ended, or never was",
            context=context.number,
            seq_id=seq_id,
            generation=generation,
            current_generation=sequence.generation if sequence else None,
        )
    return sequence
