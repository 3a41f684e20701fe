"""Sequences come and go: alloc with its prefix match and lease, waiting for an id, release, get."""

from operator import attrgetter
from struct import pack

from kvd.core import pins
from kvd.core.arenas import Arena
from kvd.core.cache import AllocBacking, Cache, Checking, Deferred
from kvd.core.checking import check_first
from kvd.core.events import Backed, Effect
from kvd.core.holds import WALK_BLOCKS
from kvd.core.noting import note_alloc, note_release, note_timed_out
from kvd.core.pins import Pin
from kvd.core.sequences import (
    Context,
    Opening,
    Sequence,
    Session,
    State,
    Waiter,
    find_context,
    find_sequence,
)
from kvd.core.tree import NOTHING, SEALED, Match, match
from kvd_proto import messages
from kvd_proto.errors import (
    BadMessage,
    KvdError,
    NoSequenceFree,
    ResourceError,
    SequenceLimit,
    StaleHandle,
    TooMany,
    UnknownContext,
)
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import (
    FAILED,
    Alloc,
    Allocated,
    Blocks,
    Done,
    Get,
    KeepAlive,
    KeptAlive,
    Release,
)


def alloc(
    cache: Cache,
    session: Session,
    correlation: int,
    message: Alloc,
    now: float,
    effects: list[Effect],
) -> Allocated | None:
    """Answer now, or return None: the reply comes when an id is free, the reserve is backed, what
    an earlier daemon left has been checked, or a long prompt has matched to its end."""
    context = find_context(session, cache.contexts, message.context)
    if message.reserve_tokens and not message.store:
        raise BadMessage(
            "no room can be reserved for a sequence that is not stored",
            reserve_tokens=message.reserve_tokens,
        )
    if message.use and defer(cache, session, correlation, context.arena, message, effects):
        return None
    limits = cache.limits
    if (
        context.free_ids
        and not context.waiting
        and cache.open_sequences < limits.max_sequences
        and session.open_sequences < limits.session_sequences
    ):
        return _open(cache, context, correlation, message, now, effects)
    if message.wait_ms:
        _count_waiting(cache, session, message)
        _wait(cache, Waiter(cache.next_ticket, correlation, context, message, now))
        return None
    raise _no_id(cache, context)


def release(
    cache: Cache, session: Session, message: Release, now: float, effects: list[Effect]
) -> Done:
    """The owner's word that the sequence's K/V is gone: the id may be handed out again."""
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    failed = message.outcome == FAILED
    session.counters.sequences_failed += failed
    if cache.budget.journal.is_followed:
        note_release(cache, sequence, failed)
    close_sequence(cache, sequence, State.FAILED if failed else State.COMPLETED, effects)
    serve_waiters(cache, now, effects)
    return Done()


def get(cache: Cache, session: Session, message: Get, now: float) -> Blocks:
    """The sequence's blocks that are sealed, from `first_block` on. Its leases stay as they are."""
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    sequence.touched = now
    last = node = sequence.leased
    slots: list[int] = []
    while (parent := node.parent) is not None:
        slots.append(node.slot)
        if node.state is not SEALED:  # and what is below it may not be read yet
            slots.clear()
            last = parent
        node = parent
    slots.reverse()
    del slots[: message.first_block]
    return Blocks(min(sequence.length, last.end), last.n_tokens, pack(f"<{len(slots)}I", *slots))


def keep_alive(cache: Cache, session: Session, message: KeepAlive, now: float) -> KeptAlive:
    """Let the idle time of these sequences, or of all of the context, begin anew. All or none: a
    handle that is wrong is refused. One that has timed out stays so, and is named."""
    context = find_context(session, cache.contexts, message.context)
    if len(message.seq_ids) != len(message.generations):
        raise BadMessage(
            "there is one generation for each seq_id",
            seq_ids=len(message.seq_ids),
            generations=len(message.generations),
        )
    handles = zip(message.seq_ids, message.generations, strict=True)
    named = [find_sequence(context, seq_id, generation) for seq_id, generation in handles]
    sequences = named or list(context.open.values())
    for sequence in sequences:
        sequence.touched = now
    return KeptAlive([each.seq_id for each in sequences if each.state is State.TIMED_OUT])


def close_sequence(cache: Cache, sequence: Sequence, outcome: str, effects: list[Effect]) -> None:
    """End a sequence: its leases and its reservation go, its id is free."""
    leased = sequence.leased
    cache.budget.unhold(leased, effects)
    if leased.holds:
        # Others hold it still, perhaps until a crash: also then it is known to be in use.
        cache.budget.use(leased, effects)
    if sequence.reserved:
        _end_reservation(cache, sequence, sequence.reserved)
        sequence.reserved.clear()
    cache.timed_out_sequences -= sequence.state is State.TIMED_OUT
    sequence.state = outcome
    sequence.context.give_back(sequence)
    sequence.context.session.open_sequences -= 1
    cache.open_sequences -= 1


def serve_waiters(cache: Cache, now: float, effects: list[Effect]) -> None:
    """Hand free ids to those who wait, first come first served."""
    while cache.waiting and cache.open_sequences < cache.limits.max_sequences:
        first_ones = [
            next(iter(context.waiting))
            for context in cache.contexts.values()
            if context.waiting
            and context.free_ids
            and context.session.open_sequences < cache.limits.session_sequences
        ]
        if not first_ones:
            return
        waiter = min(first_ones, key=attrgetter("ticket"))
        _stop_waiting(cache, waiter)
        context, correlation = waiter.context, waiter.correlation
        body: Allocated | KvdError | None
        try:
            body = _open(cache, context, correlation, waiter.message, now, effects)
        except ResourceError as error:
            body = error
        if body is not None:
            cache.reply(context.session, correlation, body, effects)


def refuse_waiters(cache: Cache, context: Context, effects: list[Effect]) -> None:
    """Nobody can wait for an id of a context that closes."""
    for waiter in list(context.waiting):
        _stop_waiting(cache, waiter)
        error = UnknownContext("the context was closed", context=context.number)
        cache.reply(context.session, waiter.correlation, error, effects)


def defer(
    cache: Cache,
    session: Session,
    correlation: int,
    arena: Arena,
    message: Alloc | messages.Pin,
    effects: list[Effect],
) -> bool:
    """Let a request wait until all that it could match at first has been checked. False: it need
    not."""
    most = WALK_BLOCKS if isinstance(message, Alloc) else messages.MAX_TOKENS
    check = check_first(cache, arena.root, message.tokens, most, effects)
    if check is None:
        return False
    _count_waiting(cache, session, message)
    check.deferred.append(Deferred(session, correlation, message))
    return True


def waits_no_longer(session: Session, message: Alloc | messages.Pin) -> None:
    """It is tried again, or not wanted any more."""
    session.waiting -= 1
    session.waiting_bytes -= len(message.tokens)


def forget_deferred(cache: Cache, session: Session) -> None:
    """The session has ended: nobody waits for the checks that its requests have asked for."""
    for job in cache.jobs.values():
        if isinstance(job, Checking):
            for waiting in [each for each in job.deferred if each.session is session]:
                waits_no_longer(session, waiting.message)
                job.deferred.remove(waiting)


def expire(cache: Cache, now: float, effects: list[Effect]) -> None:
    """Answer those whose time to wait is over, and end pins whose time is. Mark sequences that
    nobody asked for in time; their ids come back by release or death."""
    while (owner := cache.deadlines.pop(now)) is not None:
        if isinstance(owner, Waiter):
            _stop_waiting(cache, owner)
            error = _no_id(cache, owner.context)
            error.details["waited_ms"] = owner.message.wait_ms
            cache.reply(owner.context.session, owner.correlation, error, effects)
        elif isinstance(owner, Pin):
            pins.end(cache, owner, "expired", effects)
        else:
            owner.state = State.TIMED_OUT
            cache.timed_out_sequences += 1
            owner.context.session.counters.sequences_timed_out += 1
            note_timed_out(cache, owner, now)


def reserve_backed(cache: Cache, job: AllocBacking, event: Backed, effects: list[Effect]) -> None:
    """The memory of an alloc's reservation is there, or is not; or the sequence is gone."""
    sequence = job.sequence
    arena, session = sequence.context.arena, sequence.context.session
    if event.error is None and sequence.is_open:
        sequence.reserved = job.slots
        cache.reply(session, job.correlation, job.reply, effects)
        return
    unbacked = set() if event.error is None else set(job.to_back)
    cache.budget.unback(arena, unbacked)
    session.reserved.add(-len(unbacked), 0, arena.stride)
    _end_reservation(cache, sequence, [slot for slot in job.slots if slot not in unbacked])
    if sequence.is_open:
        close_sequence(cache, sequence, State.FAILED, effects)
    error = event.error or StaleHandle("the sequence was closed before its room was there")
    cache.reply(session, job.correlation, error, effects)


def _open(
    cache: Cache,
    context: Context,
    correlation: int,
    message: Alloc,
    now: float,
    effects: list[Effect],
) -> Allocated | None:
    """Take an id, match, lease and reserve. An id is free. None: the prompt is so long that it goes
    on in `open_some`, or the reserve is being backed."""
    arena = context.arena
    found = NOTHING
    if message.use:
        found = match(arena.root, message.tokens, arena.block_tokens * TOKEN_BYTES, WALK_BLOCKS)
    sequence = context.take_id(message.request, message.idle_timeout_ms / 1000, now)
    sequence.stores = bool(message.store)
    cache.open_sequences += 1
    context.session.open_sequences += 1
    slots = _lease(cache, sequence, found, effects)
    if found.is_cut:
        sequence.state = State.PENDING
        cache.openings.append(Opening(sequence, correlation, message, [slots]))
        return None
    return _opened(cache, sequence, correlation, message, slots, effects)


def open_some(cache: Cache, now: float, effects: list[Effect]) -> None:
    """Go on with one of the long allocs, for WALK_BLOCKS blocks."""
    if not cache.openings:
        return
    opening = cache.openings.popleft()
    sequence, message = opening.sequence, opening.message
    session = sequence.context.session
    if not sequence.is_open:
        error = StaleHandle("the sequence was closed before its prompt had been matched")
        cache.reply(session, opening.correlation, error, effects)
        return
    check = check_first(cache, sequence.tip, message.tokens, WALK_BLOCKS, effects)
    if check is not None:
        check.openings.append(opening)
        return
    block_bytes = sequence.context.arena.block_tokens * TOKEN_BYTES
    found = match(sequence.tip, message.tokens, block_bytes, WALK_BLOCKS)
    opening.slots.append(_lease(cache, sequence, found, effects))
    if found.is_cut:
        cache.openings.append(opening)
        return
    sequence.state = State.PROCESSING
    sequence.touched = now
    slots = b"".join(opening.slots)
    body: Allocated | KvdError | None
    try:
        body = _opened(cache, sequence, opening.correlation, message, slots, effects)
    except ResourceError as error:
        body = error
    if body is not None:
        cache.reply(session, opening.correlation, body, effects)
    serve_waiters(cache, now, effects)  # its id is free again if it was refused


def _lease(cache: Cache, sequence: Sequence, found: Match, effects: list[Effect]) -> bytes:
    """Let the sequence go on to what was found; the slots of that."""
    blocks = found.full if found.partial is None else [*found.full, found.partial]
    sequence.length = found.n_tokens
    if found.full:
        sequence.tip = found.full[-1]
    if blocks:
        cache.lease(sequence, blocks[-1], effects)
    return pack(f"<{len(blocks)}I", *[block.slot for block in blocks])


def _opened(
    cache: Cache,
    sequence: Sequence,
    correlation: int,
    message: Alloc,
    slots: bytes,
    effects: list[Effect],
) -> Allocated | None:
    """All that matches is leased: reserve, and answer. None: the reserve is being backed."""
    reply = Allocated(
        sequence.seq_id, sequence.generation, sequence.length, sequence.leased.n_tokens, slots
    )
    pending = False
    if message.reserve_tokens:
        try:
            pending = _reserve(cache, sequence, correlation, message, reply, effects)
        except ResourceError:
            close_sequence(cache, sequence, State.FAILED, effects)
            raise
    if message.idle_timeout_ms:
        cache.deadlines.add(sequence)
    counters = sequence.context.session.counters
    counters.sequences_opened += 1
    counters.sequences_not_stored += not message.store
    if message.use:
        counters.queried_tokens += len(message.tokens) // TOKEN_BYTES
        counters.hit_tokens += reply.matched_tokens
    else:
        counters.sequences_not_matched += 1
    if cache.budget.journal.is_followed:
        note_alloc(cache, sequence, len(message.tokens) // TOKEN_BYTES, len(slots) // 4)
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
    arena, session = sequence.context.arena, sequence.context.session
    n_slots = -(-message.reserve_tokens // arena.block_tokens)
    if session.reserved.n_bytes + n_slots * arena.stride > cache.limits.session_reserved:
        cache.budget.check_room(arena, n_slots)  # whose answer says more, if it has none
        raise TooMany(
            "this session would have more room set aside than it may",
            asked_bytes=n_slots * arena.stride,
            reserved_bytes=session.reserved.n_bytes,
            max_reserved=cache.limits.session_reserved,
        )
    taken = cache.budget.take(arena, n_slots, effects)
    session.reserved.add(n_slots, 0, arena.stride)
    sequence.limit = sequence.tip.end + message.reserve_tokens
    if not taken.to_back:
        sequence.reserved = taken.slots
        return False
    job = AllocBacking(correlation, sequence, taken.slots, taken.to_back, reply)
    owner = sequence.context.session.id
    effects.append(cache.budget.back_effect(cache.new_job(job), arena, owner, taken.to_back))
    return True


def refuse_beyond_limit(cache: Cache, session: Session, n_more: int) -> None:
    """Raise SequenceLimit if the session may not open so many sequences more."""
    if session.open_sequences + n_more > cache.limits.session_sequences:
        raise SequenceLimit(
            "this session has as many sequences open as it may",
            max_session_sequences=cache.limits.session_sequences,
        )


def _end_reservation(cache: Cache, sequence: Sequence, slots: list[int]) -> None:
    """Slots that were set aside for the sequence, and were not used, are free."""
    arena = sequence.context.arena
    for slot in slots:
        cache.budget.give_back(arena, slot)
    sequence.context.session.reserved.add(-len(slots), 0, arena.stride)


def _count_waiting(cache: Cache, session: Session, message: Alloc | messages.Pin) -> None:
    """One more request of this session waits, if it may: the daemon keeps its tokens meanwhile."""
    limits = cache.limits
    n_bytes = session.waiting_bytes + len(message.tokens)
    if session.waiting >= limits.session_waiting or n_bytes > limits.session_waiting_bytes:
        raise TooMany(
            "this session has as many allocs waiting as it may",
            waiting=session.waiting,
            max_waiting=limits.session_waiting,
            tokens_bytes=n_bytes,
            max_tokens_bytes=limits.session_waiting_bytes,
        )
    session.waiting += 1
    session.waiting_bytes = n_bytes


def _wait(cache: Cache, waiter: Waiter) -> None:
    cache.next_ticket += 1
    cache.waiting[waiter] = waiter.context.waiting[waiter] = None
    cache.deadlines.add(waiter)


def _stop_waiting(cache: Cache, waiter: Waiter) -> None:
    waits_no_longer(waiter.context.session, waiter.message)
    del cache.waiting[waiter]
    del waiter.context.waiting[waiter]


def _no_id(cache: Cache, context: Context) -> ResourceError:
    if cache.open_sequences >= cache.limits.max_sequences:
        return SequenceLimit(
            "too many sequences are open in the daemon",
            max_sequences=cache.limits.max_sequences,
        )
    if context.session.open_sequences >= cache.limits.session_sequences:
        return SequenceLimit(
            "this session has as many sequences open as it may",
            max_session_sequences=cache.limits.session_sequences,
        )
    return NoSequenceFree(
        "every sequence id of the context is in use",
        context=context.number,
        in_use=len(context.open),
    )
