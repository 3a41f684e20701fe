"""Append: check, plan, make room, copy, seal; and flush. What a block goes through: commits.py."""

from struct import unpack

from kvd.core.cache import AppendBacking, Cache, Copying
from kvd.core.commits import (
    Commit,
    begin,
    copy_item,
    fail_first_source,
    plan_append,
    remove_failed,
    seal,
    sequences_below,
)
from kvd.core.events import Backed, Completed, Copied, Copy, Effect, Reply
from kvd.core.sequences import (
    Sequence,
    Session,
    State,
    WaitingFlush,
    find_context,
    find_sequence,
)
from kvd.core.tree import FILLING, GONE, NO_SLOT, Block
from kvd_proto.errors import (
    BadMessage,
    BadPosition,
    BadStaging,
    KvdError,
    ReservationExceeded,
    SequenceEnded,
    Unavailable,
)
from kvd_proto.geometry import PAGE_BYTES
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_TOKENS, Append, Appended, Flush, Flushed

MAX_FAILURES = 1000
"""A session that never flushes is told of so many failed commits, the latest ones."""


def append(
    cache: Cache,
    session: Session,
    correlation: int,
    message: Append,
    staging: memoryview | None,
    now: float,
    effects: list[Effect],
) -> None:
    """Take the blocks in. The reply is an effect: now, or when the blocks' slots are backed."""
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    sequence.touched = now
    offsets = _check(session, sequence, message, staging)
    arena = context.arena
    plan = plan_append(sequence.tip, message.tokens, arena.block_tokens * TOKEN_BYTES)
    # From here on the blocks that exist must stay, whatever has to be evicted for the others.
    anchor = plan.existing[-1] if plan.existing else sequence.tip
    cache.budget.hold(anchor)
    try:
        own = min(len(sequence.reserved), len(plan.missing))
        taken = cache.budget.take(arena, len(plan.missing) - own, effects)
    except KvdError:
        cache.budget.unhold(anchor, effects)
        raise
    slots = [sequence.reserved.pop() for _ in range(own)] + taken.slots
    session.last_commit += 1
    commit = Commit(session, session.last_commit)
    session.commits[commit.number] = commit
    begun = begin(plan, sequence, slots, offsets, commit, cache.budget)
    cache.budget.unhold(anchor, effects)
    _advance(cache, sequence, message, begun.new[-1] if begun.new else anchor, effects)
    cache.counters.present_blocks += begun.present
    cache.counters.joined_blocks += begun.joined
    reply = Appended(commit.number, len(begun.new), begun.present, begun.joined)
    if taken.to_back:
        for block in begun.new:
            block.in_flight = True
        job = AppendBacking(session, correlation, commit, begun.new, taken.to_back, reply)
        effects.append(cache.budget.back_effect(cache.new_job(job), arena, taken.to_back))
        return
    _accept(cache, commit, correlation, reply, begun.new, effects)
    advance_completed(session, effects)


def append_backed(cache: Cache, job: AppendBacking, event: Backed, effects: list[Effect]) -> None:
    """The memory of an append's blocks is there, or is not; or its session has died meanwhile."""
    arena = job.blocks[0].arena
    unbacked = set(job.to_back) if event.error is not None else set()
    if unbacked:
        cache.budget.unback(arena, job.to_back)
    for block in job.blocks:
        block.in_flight = False
        if block.slot in unbacked:
            block.slot = NO_SLOT
        elif block.state is GONE:
            cache.budget.give_back(arena, block.slot)
    if event.error is not None:
        # Whoever joined would find no memory either.
        _remove(cache, job.blocks[0], event.error, effects)
        job.commit.failure = None
        job.commit.answered = True
        effects.append(Reply(job.session.id, job.correlation, event.error))
    elif job.session.alive:
        waiting = [block for block in job.blocks if block.state is FILLING]
        _accept(cache, job.commit, job.correlation, job.reply, waiting, effects)
    else:
        # It has not been told that its commit was taken, so the commit never was.
        error = Unavailable("the session ended before its commit was accepted")
        for block in job.blocks:
            _source_failed(cache, block, error, effects)


def copied(cache: Cache, job: Copying, event: Copied, effects: list[Effect]) -> None:
    """Copies have ended: each of their blocks is sealed, or its next source takes over."""
    for block, result in zip(job.blocks, event.results, strict=True):
        job.session.in_flight -= 1
        block.in_flight = False
        if block.state is GONE:
            cache.budget.give_back(block.arena, block.slot)
        elif result.error is not None:
            cache.counters.failed_blocks += 1
            _source_failed(cache, block, result.error, effects)
        else:
            cache.counters.stored_blocks += 1
            cache.counters.stored_bytes += block.arena.format.size(block.n_tokens)
            seal(block, result.checksum, cache.next_generation, cache.budget, effects)
            cache.next_generation += 1


def flush(cache: Cache, session: Session, correlation: int, message: Flush) -> Flushed | None:
    """Answer when every commit up to the one named is finished."""
    if message.commit > session.last_commit:
        raise BadMessage(
            "no such commit was made", commit=message.commit, last_commit=session.last_commit
        )
    if session.completed < message.commit:
        session.flushes.append(WaitingFlush(message.commit, correlation))
        return None
    return _flushed(session)


def advance_completed(session: Session, effects: list[Effect]) -> None:
    """Raise the session's completed number as far as its commits allow, and answer flushes."""
    before = session.completed
    while session.commits:
        commit = next(iter(session.commits.values()))
        if commit.pending or not commit.answered:
            break
        del session.commits[commit.number]
        session.completed = commit.number
        if commit.failure is not None:
            session.failures.append(commit)
            del session.failures[:-MAX_FAILURES]
    if session.completed == before or not session.alive:
        return
    effects.append(Completed(session.id, session.completed))
    for waiting in [flush for flush in session.flushes if flush.commit <= session.completed]:
        session.flushes.remove(waiting)
        effects.append(Reply(session.id, waiting.correlation, _flushed(session)))


def _check(
    session: Session, sequence: Sequence, message: Append, staging: memoryview | None
) -> list[int]:
    """Everything that can be wrong with an append, before anything changes. Returns the offsets."""
    arena = sequence.context.arena
    n_tokens = len(message.tokens) // TOKEN_BYTES
    end = message.start + n_tokens
    offsets = list(unpack(f"<{len(message.staged) // 8}Q", message.staged))
    if sequence.state is State.TIMED_OUT:
        raise SequenceEnded("the sequence has timed out", seq_id=sequence.seq_id)
    if message.start != sequence.tip.end:
        raise BadPosition(
            "an append starts where the sequence's full blocks end",
            start=message.start,
            expected=sequence.tip.end,
        )
    if sequence.limit is not None and end > sequence.limit:
        raise ReservationExceeded(
            "the append goes beyond what alloc reserved", end=end, reserved_to=sequence.limit
        )
    n_blocks = -(-n_tokens // arena.block_tokens)
    if n_tokens == 0 or end > MAX_TOKENS or len(offsets) != n_blocks:
        raise BadMessage(
            "an append has tokens, and one staged offset for each block",
            tokens=n_tokens,
            most_tokens=MAX_TOKENS,
            blocks=n_blocks,
            offsets=len(offsets),
        )
    if staging is None:
        raise BadStaging("this session has no staging")
    for index, offset in enumerate(offsets):
        start = message.start + index * arena.block_tokens
        count = min(arena.block_tokens, end - start)
        size = arena.format.size(count)
        if offset < PAGE_BYTES or offset + size > session.staging_bytes or offset % 8:
            raise BadStaging(
                "a staged block lies outside of the staging or is not aligned to 8 bytes",
                block=index,
                offset=offset,
                size=size,
                staging_bytes=session.staging_bytes,
            )
        arena.format.validate(staging[offset : offset + size], start, count)
    return offsets


def _advance(
    cache: Cache, sequence: Sequence, message: Append, deepest: Block, effects: list[Effect]
) -> None:
    """The sequence goes on to `deepest`, which it leases from now on."""
    n_tokens = len(message.tokens) // TOKEN_BYTES
    sequence.length = message.start + n_tokens
    is_full = n_tokens % sequence.context.arena.block_tokens == 0
    assert deepest.parent is not None
    sequence.tip = deepest if is_full else deepest.parent
    cache.lease(sequence, deepest, effects)


def _accept(
    cache: Cache,
    commit: Commit,
    correlation: int,
    reply: object,
    blocks: list[Block],
    effects: list[Effect],
) -> None:
    """Answer first: a client must learn its commit's number before that is completed. Then copy."""
    effects.append(Reply(commit.session.id, correlation, reply))
    commit.answered = True
    _start_copy(cache, commit.session, blocks, effects)


def _start_copy(cache: Cache, session: Session, blocks: list[Block], effects: list[Effect]) -> None:
    """Copy the blocks' first sources, which are all in this session's staging."""
    if blocks:
        job = cache.new_job(Copying(session, blocks))
        items = [copy_item(block) for block in blocks]
        effects.append(Copy(job, blocks[0].arena.number, session.id, items))


def _source_failed(cache: Cache, block: Block, error: KvdError, effects: list[Effect]) -> None:
    """The first staged copy of a block is no good: the next takes over, or the block goes."""
    if block.state is GONE:
        return
    if fail_first_source(block, error):
        assert block.sources
        _start_copy(cache, block.sources[0].commit.session, [block], effects)
    else:
        _remove(cache, block, error, effects)


def _remove(cache: Cache, block: Block, error: KvdError, effects: list[Effect]) -> None:
    """Drop a block that cannot be filled; sequences that rest on it fall back to its parent."""
    if block.state is GONE:
        return
    parent = block.parent
    assert parent is not None
    for sequence in sequences_below(block, cache.sequences()):
        cache.lease(sequence, parent, effects)
        sequence.tip = parent
        sequence.length = parent.end
    remove_failed(block, error, cache.budget, effects)


def _flushed(session: Session) -> Flushed:
    failures = [
        [commit.number, commit.failure.code, commit.failure.message]
        for commit in session.failures
        if commit.failure is not None
    ]
    session.failures.clear()
    return Flushed(session.completed, failures)
