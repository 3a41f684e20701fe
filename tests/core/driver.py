"""One core, asked directly: for tests that tell a story and assert exact ids.

The shell's jobs are ended by the test, one by one, or all at once by `work`. Random stories are
world.py's.
"""

import math
from struct import pack, unpack
from typing import Any

import pytest

from kvd.core import (
    accounting,
    allocating,
    budget,
    explaining,
    forgetting,
    machine,
    recount,
    siblings,
    tree,
)
from kvd.core.arenas import Arena
from kvd.core.cache import Counters, Limits, sum_of
from kvd.core.events import (
    NO_SLOT,
    ArenaFound,
    Back,
    Backed,
    BackPins,
    Check,
    Checked,
    Connected,
    Copied,
    Copy,
    CopyResult,
    CreateArena,
    Disconnected,
    DropPin,
    DropRecord,
    Effect,
    Event,
    FoundPin,
    FoundRecord,
    ReadersGone,
    RenewPin,
    Reply,
    Requested,
    Ticked,
    UseRecord,
    WritePin,
    WriteRecord,
)
from kvd.core.machine import Core
from kvd.core.tree import ADOPTED, SEALED, Block
from kvd_proto.errors import BadPayload, KvdError, NoSpace
from kvd_proto.geometry import Geometry
from kvd_proto.messages import (
    Alloc,
    Allocated,
    Append,
    Appended,
    Flush,
    Flushed,
    OpenContext,
    Pin,
    RegisterModel,
)
from kvd_proto.payload import ArrayBlock

PAGE = 4096
STAGING = 16 * PAGE
BUDGET = 1 << 20
FULL_DIRECTORY = 11 * PAGE
"""Of the arena that has all of this budget, once it has used a slot, its index included."""
INDEX = 2 * PAGE
"""Of that."""
SMALL_DIRECTORY = 6 * PAGE
"""Of an arena of up to 56 slots."""
BLOCK_TOKENS = 2


def sealed_blocks(arena: Arena) -> list[Block]:
    """What the arena's directory must hold: adopted blocks have their record already."""
    return [block for block in arena.blocks if block and block.state in (ADOPTED, SEALED)]


def walk_in_steps_of(n_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a walk over blocks, as a match, or the end of a lease, go on for so many at once."""
    for module in (allocating, machine, budget, explaining, forgetting):
        monkeypatch.setattr(module, "WALK_BLOCKS", n_blocks)


def siblings_in_runs_of(n_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many children of one block be few already."""
    for module in (siblings, tree):
        monkeypatch.setattr(module, "RUN", n_blocks)


class Handle:
    """A sequence as its client knows it."""

    def __init__(self, session: bytes, context: int, reply: Allocated) -> None:
        self.session = session
        self.context = context
        self.seq_id = reply.seq_id
        self.generation = reply.generation
        self.matched = reply.matched_tokens
        self.last_block_tokens = reply.last_block_tokens
        self.slots = slots_of(reply.slots)

    @property
    def fields(self) -> tuple[int, int, int]:
        return (self.context, self.seq_id, self.generation)


class Driver:
    """Blocks have two tokens and a stride of one page. `effects` are the last event's."""

    checked = True
    """Whether everything is recounted after each event."""

    def __init__(self, budget: int = BUDGET, **limits: int) -> None:
        self.limits = Limits(budget, first_context=1, **limits)
        self.core = Core(self.limits)
        self.now = 0.0
        self.effects: list[Effect] = []
        self.jobs: list[Back | BackPins | Check | Copy] = []
        """Not ended yet, in order."""
        self.replies: dict[int, Any] = {}
        """By correlation."""
        self.asked = 0
        self.staged = PAGE
        self.made: dict[int, CreateArena] = {}
        self.records: dict[int, dict[int, FoundRecord]] = {}
        """By arena and slot: what the directory would hold."""
        self.pins: dict[int, dict[int, FoundPin]] = {}
        """By arena and place: the pins that it would hold."""

    @property
    def cache(self):
        return self.core.cache

    def handle(self, event: Event) -> None:
        self.effects = self.core.handle(event, self.now)
        if self.checked:
            recount.check(self.cache)
        for effect in self.effects:
            if isinstance(effect, Reply):
                assert effect.correlation not in self.replies, "answered twice"
                self.replies[effect.correlation] = effect.body
            elif isinstance(effect, Back | BackPins | Check | Copy):
                self.jobs.append(effect)
            else:
                self._record(effect)

    def _record(self, effect: Effect) -> None:
        match effect:
            case CreateArena(number):
                self.made[number] = effect
                self.records[number] = {}
                self.pins[number] = {}
            case WriteRecord(number, slot):
                self.records[number][slot] = FoundRecord(*effect[1:], effect.generation)
            case UseRecord(number, slot, last_use):
                record = self.records[number][slot]
                self.records[number][slot] = record._replace(last_use=last_use)
            case DropRecord(number, slot, heir, last_use):
                if heir != NO_SLOT:
                    record = self.records[number][heir]
                    self.records[number][heir] = record._replace(last_use=last_use)
                del self.records[number][slot]
            case WritePin(number, place):
                assert place not in self.pins[number], "the place has a pin already"
                self.pins[number][place] = FoundPin(*effect[1:])
            case RenewPin(number, place, expires):
                pin = self.pins[number][place]
                self.pins[number][place] = pin._replace(expires=expires)
            case DropPin(number, place):
                del self.pins[number][place]

    def of_kind(self, kind: type) -> list[Any]:
        """The last event's effects of one kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    # --- clients

    def connect(self, name: str = "s", tenant: str = "t", staging: int = STAGING) -> bytes:
        session = name.encode()
        self.handle(Connected(session, name, 1, 1000, tenant, staging))
        return session

    def disconnect(self, session: bytes) -> None:
        self.handle(Disconnected(session))

    def ask(self, session: bytes, message: Any) -> Any:
        """The reply, or None if it does not come at once. Its correlation is `asked`."""
        self.asked += 1
        staging = memoryview(bytes(STAGING))
        self.handle(Requested(session, self.asked, message, staging))
        return self.replies.get(self.asked)

    def refusal(self, session: bytes, message: Any) -> type[KvdError]:
        """The class of the error that is answered."""
        reply = self.ask(session, message)
        assert isinstance(reply, KvdError), reply
        return type(reply)

    def register(self, session: bytes, name: str = "m", pages: int = 1, **other: Any) -> int:
        reply = self.ask(session, model(name, pages, **other))
        return reply.model

    def context(self, session: bytes, model: int = 1, n_ids: int = 4, busy: Any = ()) -> int:
        return self.ask(session, OpenContext(model, n_ids, list(busy))).context

    def alloc(self, session: bytes, context: int, *tokens: int, **other: int) -> Handle:
        reply = self.ask(session, alloc(context, *tokens, **other))
        assert isinstance(reply, Allocated), reply
        return Handle(session, context, reply)

    def append(self, handle: Handle, start: int, *tokens: int) -> Any:
        """Stage and append; the reply, or None if it waits for memory."""
        return self.ask(handle.session, append(handle, start, *tokens))

    def store(self, handle: Handle, start: int, *tokens: int) -> None:
        """Append, and wait until the blocks are sealed."""
        self.append(handle, start, *tokens)
        correlation = self.asked
        self.work()
        assert isinstance(self.replies[correlation], Appended), self.replies[correlation]

    def pin(self, session: bytes, *tokens: int, **other: Any) -> Any:
        """Pin what is cached of these tokens, and end the jobs that takes; the reply."""
        self.ask(session, self.pin_message(*tokens, **other))
        correlation = self.asked
        self.work()
        return self.replies[correlation]

    def pin_message(self, *tokens: int, arena: int = 1, owner: str = "o", ttl: int = 0) -> Pin:
        """For `ttl` milliseconds (0: for ever)."""
        return Pin(self.made[arena].fingerprint, packed(*tokens), owner, ttl)

    def flush(self, session: bytes, commit: int) -> Flushed | None:
        return self.ask(session, Flush(commit))

    # --- a crash, and the next daemon

    def found(self, number: int = 1, **other: Any) -> ArenaFound:
        """What the next daemon finds of an arena, if it were started now; with other fields."""
        made = self.made[number]
        event = ArenaFound(
            number,
            made.tenant,
            made.name,
            made.fingerprint,
            made.payload_format,
            made.block_tokens,
            made.layers,
            made.slots,
            made.stride_bytes,
            has_readers=False,
            records=[self.records[number][slot] for slot in sorted(self.records[number])],
            unrecorded=[],
            pins=list(self.pins[number].values()),
        )
        return event._replace(**other)

    def restart(self, *found: ArenaFound) -> None:
        """Another daemon, which finds these arenas, or all of them. Nothing is checked yet."""
        found = found or tuple(self.found(number) for number in self.made)
        self.core = Core(self.limits)
        self.jobs.clear()
        for event in found:
            self.handle(event)

    def readers_gone(self, arena: int = 1) -> None:
        self.handle(ReadersGone(arena))

    def check(self, *bad: int) -> None:
        """End the first job, which is to check; the items `bad` are damaged."""
        job = self.jobs.pop(0)
        assert isinstance(job, Check)
        results = [index not in bad for index in range(len(job.items))]
        self.handle(Checked(job.job, results))

    # --- time and jobs

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Ticked())

    def settle(self) -> None:
        """Let all steps of what takes long be done."""
        while self.core.next_deadline() == -math.inf:
            self.pass_time(0)

    def back(self, error: KvdError | None = None) -> None:
        """End the first job, which is to give memory."""
        job = self.jobs.pop(0)
        assert isinstance(job, Back | BackPins)
        self.handle(Backed(job.job, error))

    def copy(self, *bad: int) -> None:
        """End the first job, which is to copy; the items `bad` are not accepted."""
        job = self.jobs.pop(0)
        assert isinstance(job, Copy)
        results = [
            CopyResult(0, BadPayload("spoilt")) if index in bad else CopyResult(item.slot, None)
            for index, item in enumerate(job.items)
        ]
        self.handle(Copied(job.job, results))

    def work(self, *bad: int) -> None:
        """End all jobs, well but for the items `bad` of each copy."""
        while self.jobs:
            if isinstance(self.jobs[0], Back | BackPins):
                self.back()
            elif isinstance(self.jobs[0], Check):
                self.check()
            else:
                self.copy(*bad)

    # --- what there is

    @property
    def counters(self) -> Counters:
        """Of all tenants, and of requests without a session."""
        return sum_of([self.cache.counters, *self.cache.counters_of.values()])

    def evicted(self, tenant: str = "t") -> dict[str, int]:
        """How many of the tenant's blocks were dropped, by reason, those that are 0 left out."""
        counts = self.cache.budget.tenants[tenant].evicted
        return {reason.value: count for reason, count in counts.items() if count}

    def blocks(self, arena: int = 1) -> dict[tuple[int, ...], int]:
        """All sealed blocks by path, with their slots."""
        return {
            path_of(block): block.slot for block in sealed_blocks(self.cache.budget.arenas[arena])
        }

    def lru(self) -> list[tuple[int, tuple[int, ...]]]:
        """What would be evicted, in this order: arena and path of each block."""
        return [(block.arena.number, path_of(block)) for block in self.cache.budget.oldest_first()]

    def counts(self, arena: int = 1) -> dict[str, int]:
        """Slots by state, those that are 0 left out."""
        counts = accounting.arena_counts(self.cache.budget.arenas[arena])
        return {name: count for name, count in counts.items() if count and name != "total"}


def model(name: str = "m", pages: int = 1, **other: Any) -> RegisterModel:
    """A model of array blocks with a stride of so many pages."""
    row = pages * PAGE // (2 * BLOCK_TOKENS)
    fields: dict[str, Any] = {
        "name": name,
        "fingerprint": name.encode().ljust(32),
        "payload_format": "array",
        "block_tokens": BLOCK_TOKENS,
        "layers": [["f16", row, "f16", row]],
    }
    return RegisterModel(**{**fields, **other})


def alloc(
    context: int,
    *tokens: int,
    reserve: int = 0,
    wait_ms: int = 0,
    idle_ms: int = 0,
    use: int = 1,
    store: int = 1,
) -> Alloc:
    return Alloc(context, "request", packed(*tokens), reserve, wait_ms, idle_ms, use, store)


def append(handle: Handle, start: int, *tokens: int, staged: list[int] | None = None) -> Append:
    """All blocks staged at one place unless `staged` says where."""
    offsets = [PAGE] * -(-len(tokens) // BLOCK_TOKENS) if staged is None else staged
    return Append(*handle.fields, start, packed(*tokens), pack(f"<{len(offsets)}Q", *offsets))


def packed(*tokens: int) -> bytes:
    return pack(f"<{len(tokens)}I", *tokens)


def slots_of(data: bytes) -> list[int]:
    return list(unpack(f"<{len(data) // 4}I", data))


def path_of(block: Any) -> tuple[int, ...]:
    tokens = b""
    while block is not None:
        tokens = block.tokens + tokens
        block = block.parent
    return tuple(slots_of(tokens))


def no_space() -> NoSpace:
    return NoSpace("no memory")


def array_format(pages: int = 1) -> ArrayBlock:
    row = pages * PAGE // (2 * BLOCK_TOKENS)
    return ArrayBlock(Geometry.from_wire([["f16", row, "f16", row]]), BLOCK_TOKENS)
