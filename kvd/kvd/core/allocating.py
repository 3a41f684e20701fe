"""Sequences come and go: alloc with its prefix match and lease, waiting for an id, release, get."""

from heapq import heappush
from struct import pack

from kvd.core.cache import AllocBacking, Cache
from kvd.core.events import Backed, Effect, Reply
from kvd.core.sequences import (
    Context,
    Sequence,
    Session,
    State,
    Waiter,
    find_context,
    find_sequence,
)
from kvd.core.tree import SEALED, Block, match
from kvd_proto.errors import KvdError, NoSequenceFree, ResourceError, SequenceLimit, UnknownContext
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import Alloc, Allocated, Blocks, Done, Get, Release


def alloc(
    cache: Cache,
    session: Session,
    correlation: int,
    message: Alloc,
    now: float,
    effects: list[Effect],
) -> Allocated | None:
    """Answer now, or return None: the reply comes when an id is free or the reserve is backed."""
    context = find_context(session, cache.contexts, message.context)
    room = cache.open_sequences < cache.limits.max_sequences
    if room and context.free_ids and not _someone_waits(cache, context):
        return _open(cache, context, correlation, message, now, effects)
    if message.wait_ms:
        cache.waiting.append(Waiter(session.id, correlation, context, message, now))
        return None
    raise _no_id(cache, context)


def release(
    cache: Cache, session: Session, message: Release, now: float, effects: list[Effect]
) -> Done:
    """The owner's word that the sequence's K/V is gone: the id may be handed out again."""
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    close_sequence(cache, sequence, effects)
    serve_waiters(cache, now, effects)
    return Done()


def get(cache: Cache, session: Session, message: Get, now: float) -> Blocks:
    """The sequence's blocks that are sealed, from `first_block` on. Its leases stay as they are."""
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    sequence.touched = now
    chain: list[Block] = []
    node = sequence.leased
    while node.parent is not None:
        chain.append(node)
        node = node.parent
    sealed: list[Block] = []
    for block in reversed(chain):
        if block.state is not SEALED:
            break
        sealed.append(block)
    if not sealed:
        return Blocks(0, 0, b"")
    last = sealed[-1]
    slots = [block.slot for block in sealed[message.first_block :]]
    return Blocks(min(sequence.length, last.end), last.n_tokens, pack(f"<{len(slots)}I", *slots))


def close_sequence(cache: Cache, sequence: Sequence, effects: list[Effect]) -> None:
    """End a sequence: its leases and its reservation go, its id is free."""
    cache.budget.unhold(sequence.leased, effects)
    for slot in sequence.reserved:
        cache.budget.give_back(sequence.context.arena, slot)
    sequence.reserved.clear()
    sequence.state = State.COMPLETED
    sequence.context.give_back(sequence)
    cache.open_sequences -= 1


def serve_waiters(cache: Cache, now: float, effects: list[Effect]) -> None:
    """Hand free ids to those who wait, first come first served."""
    for waiter in list(cache.waiting):
        if cache.open_sequences >= cache.limits.max_sequences:
            return
        context = waiter.context
        if not context.free_ids:
            continue
        cache.waiting.remove(waiter)
        body: Allocated | KvdError | None
        try:
            body = _open(cache, context, waiter.correlation, waiter.message, now, effects)
        except ResourceError as error:
            body = error
        if body is not None:
            effects.append(Reply(waiter.session, waiter.correlation, body))


def expire_waiters(cache: Cache, now: float, effects: list[Effect]) -> None:
    """Tell those whose deadline has passed."""
    for waiter in list(cache.waiting):
        if waiter.deadline <= now:
            cache.waiting.remove(waiter)
            error = _no_id(cache, waiter.context)
            error.details["waited_ms"] = waiter.message.wait_ms
            effects.append(Reply(waiter.session, waiter.correlation, error))


def refuse_waiters(cache: Cache, context: Context, effects: list[Effect]) -> None:
    """Nobody can wait for an id of a context that closes."""
    for waiter in list(cache.waiting):
        if waiter.context is context:
            cache.waiting.remove(waiter)
            error = UnknownContext("the context was closed", context=context.number)
            effects.append(Reply(waiter.session, waiter.correlation, error))


def reserve_backed(cache: Cache, job: AllocBacking, event: Backed, effects: list[Effect]) -> None:
    """The memory of an alloc's reservation is there, or is not."""
    sequence, context = job.sequence, job.sequence.context
    is_open = context.open.get(sequence.seq_id) is sequence
    if event.error is not None:
        cache.budget.unback(context.arena, job.to_back)
        for slot in set(job.slots).difference(job.to_back):
            cache.budget.give_back(context.arena, slot)
        if is_open:
            close_sequence(cache, sequence, effects)
        effects.append(Reply(job.session.id, job.correlation, event.error))
    elif is_open:
        sequence.reserved = job.slots
        effects.append(Reply(job.session.id, job.correlation, job.reply))
    else:
        for slot in job.slots:
            cache.budget.give_back(context.arena, slot)


def _open(
    cache: Cache,
    context: Context,
    correlation: int,
    message: Alloc,
    now: float,
    effects: list[Effect],
) -> Allocated | None:
    """Take an id, match, lease and reserve. An id is free."""
    arena = context.arena
    found = match(arena.root, message.tokens, arena.block_tokens * TOKEN_BYTES)
    blocks = found.full if found.partial is None else [*found.full, found.partial]
    sequence = context.take_id(message.request, message.idle_timeout_ms / 1000, now)
    cache.open_sequences += 1
    sequence.length = found.n_tokens
    if found.full:
        sequence.tip = found.full[-1]
    if blocks:
        sequence.leased = blocks[-1]
        cache.budget.hold(blocks[-1])
    reply = Allocated(
        sequence.seq_id,
        sequence.generation,
        found.n_tokens,
        blocks[-1].n_tokens if blocks else 0,
        pack(f"<{len(blocks)}I", *[block.slot for block in blocks]),
    )
    pending = False
    if message.reserve_tokens:
        try:
            pending = _reserve(cache, sequence, correlation, message, reply, effects)
        except ResourceError:
            close_sequence(cache, sequence, effects)
            raise
    counters = cache.counters
    counters.sequences_opened += 1
    counters.queried_tokens += len(message.tokens) // TOKEN_BYTES
    counters.hit_tokens += found.n_tokens
    if sequence.idle_timeout:
        heappush(
            cache.expiring,
            (sequence.expires, context.number, sequence.seq_id, sequence.generation),
        )
    return None if pending else reply


def _reserve(
    cache: Cache,
    sequence: Sequence,
    correlation: int,
    message: Alloc,
    reply: Allocated,
    effects: list[Effect],
) -> bool:
    """Set slots aside after the sequence's last full block. Returns whether they need memory
    first."""
    context = sequence.context
    arena = context.arena
    n_slots = -(-message.reserve_tokens // arena.block_tokens)
    taken = cache.budget.take(arena, n_slots, effects)
    sequence.limit = sequence.tip.end + message.reserve_tokens
    if not taken.to_back:
        sequence.reserved = taken.slots
        return False
    job = AllocBacking(context.session, correlation, sequence, taken.slots, taken.to_back, reply)
    effects.append(cache.budget.back_effect(cache.new_job(job), arena, taken.to_back))
    return True


def _someone_waits(cache: Cache, context: Context) -> bool:
    return any(waiter.context is context for waiter in cache.waiting)


def _no_id(cache: Cache, context: Context) -> ResourceError:
    if cache.open_sequences >= cache.limits.max_sequences:
        return SequenceLimit(
            "too many sequences are open in the daemon",
            max_sequences=cache.limits.max_sequences,
        )
    return NoSequenceFree(
        "every sequence id of the context is in use",
        context=context.number,
        in_use=len(context.open),
    )
