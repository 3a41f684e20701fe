"""Append: check, plan, make room, copy, seal; and flush. What a block goes through: commits.py."""

from struct import unpack

from kvd.core.cache import AppendBacking, Cache, Copying
from kvd.core.commits import (
    Commit,
    begin,
    copy_item,
    drop_source,
    plan_append,
    remove_failed,
    seal,
    sequences_below,
)
from kvd.core.events import NO_SLOT, Backed, Completed, Copied, Copy, Effect
from kvd.core.reasons import Reason
from kvd.core.sequences import (
    Failure,
    Sequence,
    Session,
    State,
    WaitingFlush,
    find_context,
    find_sequence,
)
from kvd.core.tree import GONE, Block
from kvd_proto.errors import (
    BadMessage,
    BadPosition,
    BadStaging,
    KvdError,
    NotStored,
    ReservationExceeded,
    SequenceEnded,
    TooMany,
    UnknownSession,
)
from kvd_proto.geometry import PAGE_BYTES
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_TOKENS, Append, Appended, Flush, Flushed

COPY_BLOCKS = 64
"""Of one job: so many are sealed at once, in a millisecond, and others get a turn."""


def append(
    cache: Cache,
    session: Session,
    correlation: int,
    message: Append,
    staging: memoryview | None,
    now: float,
    effects: list[Effect],
) -> None:
    """Take the blocks in. The reply is an effect: now, or when the blocks' slots are backed.

    The sequence goes on at once, so that its next append need not wait for the reply, and lets go
    of an open tail or a block that matched in part. If there is no memory then, it goes back to
    where this append started, whatever has been appended to it since.
    """
    context = find_context(session, cache.contexts, message.context)
    sequence = find_sequence(context, message.seq_id, message.generation)
    sequence.touched = now
    if not sequence.stores:
        raise NotStored(
            "its alloc asked that nothing of this sequence is stored", seq_id=sequence.seq_id
        )
    if len(session.commits) >= cache.limits.session_commits:
        raise TooMany(
            "this session has as many commits in flight as it may",
            max_commits=cache.limits.session_commits,
        )
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
    session.reserved.add(-own, 0, arena.stride)
    session.last_commit += 1
    commit = Commit(session, session.last_commit)
    session.commits[commit.number] = commit
    begun = begin(plan, sequence, slots, offsets, commit, cache.budget)
    _advance(cache, sequence, message, begun.new[-1] if begun.new else anchor, effects)
    cache.budget.unhold(anchor, effects)
    session.counters.present_blocks += begun.present
    session.counters.joined_blocks += begun.joined
    reply = Appended(commit.number, len(begun.new), begun.present, begun.joined)
    if taken.to_back:
        for block in begun.new:
            block.in_flight = True
        first = plan.existing[0] if plan.existing else begun.new[0]
        job = AppendBacking(correlation, sequence, commit, first, begun.new, taken.to_back, reply)
        number = cache.new_job(job)
        effects.append(cache.budget.back_effect(number, arena, session.id, taken.to_back))
        return
    _accept(cache, commit, correlation, reply, effects)
    advance_completed(cache, session, effects)


def append_backed(cache: Cache, job: AppendBacking, event: Backed, effects: list[Effect]) -> None:
    """The memory of an append's blocks is there, or is not; or its session has died meanwhile."""
    arena = job.first.arena
    unbacked = set() if event.error is None else set(job.to_back)
    cache.budget.unback(arena, unbacked)
    for block in job.blocks:
        block.in_flight = False
        if block.slot in unbacked:
            block.slot = NO_SLOT
        elif block.state is GONE:
            cache.budget.give_back(arena, block.slot)
    if event.error is not None:
        _refuse(cache, job, event.error, effects)
    elif not job.commit.session.alive:
        # It has not been told that its commit was taken, so the commit never was.
        error = UnknownSession("the session ended before its commit was accepted")
        _refuse(cache, job, error, effects)
    else:
        _accept(cache, job.commit, job.correlation, job.reply, effects)


def copied(cache: Cache, job: Copying, event: Copied, effects: list[Effect]) -> None:
    """Copies have ended: each of their blocks is sealed, or its next source takes over."""
    counters = job.session.counters
    for block, result in zip(job.blocks, event.results, strict=True):
        job.session.in_flight -= 1
        block.in_flight = False
        if block.state is GONE:
            cache.budget.give_back(block.arena, block.slot)
        elif result.error is not None:
            counters.failed_blocks += 1
            _lose_source(cache, block, block.first_source.commit, result.error, effects)
        else:
            counters.stored_blocks += 1
            counters.stored_bytes += block.arena.format.size(block.n_tokens)
            seal(block, result.checksum, cache.budget.tick(), cache.budget, effects)


def flush(cache: Cache, session: Session, correlation: int, message: Flush) -> Flushed | None:
    """Answer when every commit up to the one named is finished."""
    if message.commit > session.last_commit:
        raise BadMessage(
            "no such commit was made", commit=message.commit, last_commit=session.last_commit
        )
    if session.completed < message.commit:
        if len(session.flushes) >= cache.limits.session_commits:
            raise TooMany(
                "this session has as many flushes waiting as it may",
                max_commits=cache.limits.session_commits,
            )
        session.flushes.append(WaitingFlush(message.commit, correlation))
        return None
    return _flushed(session)


def advance_completed(cache: Cache, session: Session, effects: list[Effect]) -> None:
    """Raise a living session's completed number as far as its commits allow, and answer
    flushes."""
    before = session.completed
    while session.commits:
        commit = next(iter(session.commits.values()))
        if commit.pending or not commit.answered:
            break
        del session.commits[commit.number]
        session.completed = commit.number
        if commit.failure is not None:
            error = commit.failure
            session.failures.append(Failure(commit.number, error.code, error.message))
    if session.completed == before:
        return
    effects.append(Completed(session.id, session.completed))
    flushes, session.flushes = session.flushes, []
    for waiting in flushes:
        if waiting.commit > session.completed:
            session.flushes.append(waiting)
        else:
            cache.reply(session, waiting.correlation, _flushed(session), effects)


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
    effects: list[Effect],
) -> None:
    """Answer first: a client must learn its commit's number before that is completed. Then copy."""
    cache.reply(commit.session, correlation, reply, effects)
    commit.answered = True
    own = [block for block in commit.unfinished if block.first_source.commit is commit]
    _start_copy(cache, commit.session, own, effects)


def _refuse(cache: Cache, job: AppendBacking, error: KvdError, effects: list[Effect]) -> None:
    """The append never was. Blocks for which others have staged copies too are theirs now, unless
    it is their slots for which there is no memory."""
    commit = job.commit
    if job.sequence.is_open:
        _fall_back(cache, job.first, [job.sequence], effects)
    for block in job.blocks:
        if block.slot == NO_SLOT:
            remove(cache, block, error, Reason.ORPHANED, effects)
    for block in commit.unfinished:
        _lose_source(cache, block, commit, error, effects)
    commit.failure = None
    commit.answered = True
    cache.reply(commit.session, job.correlation, error, effects)


def _start_copy(cache: Cache, session: Session, blocks: list[Block], effects: list[Effect]) -> None:
    """Copy the blocks' first sources, which are all in this session's staging."""
    for start in range(0, len(blocks), COPY_BLOCKS):
        some = blocks[start : start + COPY_BLOCKS]
        job = cache.new_job(Copying(session, some))
        items = [copy_item(block) for block in some]
        effects.append(Copy(job, some[0].arena.number, session.id, items))


def _lose_source(
    cache: Cache, block: Block, commit: Commit, error: KvdError, effects: list[Effect]
) -> None:
    """A commit's staged copy of a block is no good: the next takes over, or the block goes."""
    if block.state is GONE:
        return
    was_first = block.first_source.commit is commit
    drop_source(block, commit)
    commit.failure = error
    if not block.sources:
        remove(cache, block, error, Reason.ORPHANED, effects)
    elif was_first and block.first_source.commit.answered:
        _start_copy(cache, block.first_source.commit.session, [block], effects)


def remove(
    cache: Cache, block: Block, error: KvdError, reason: Reason, effects: list[Effect]
) -> None:
    """Drop a block that cannot be filled, and all below it."""
    if block.state is GONE:
        return
    budget, parent = cache.budget, block.parent
    assert parent is not None
    doomed = {block, *block.below()}
    # Whatever is held there must be let go at once; above it nothing changes meanwhile.
    budget.allowance += len(doomed)
    is_held = bool(parent.holds)
    if is_held:
        budget.hold(parent)
    _fall_back(cache, block, cache.sequences(), effects)
    budget.let_go_below(doomed, parent)
    remove_failed(block, error, reason, budget, effects)
    if is_held:
        budget.unhold(parent, effects)


def _fall_back(
    cache: Cache, block: Block, sequences: list[Sequence], effects: list[Effect]
) -> None:
    """Those of `sequences` that rest on `block` go back to its parent."""
    parent = block.parent
    assert parent is not None
    for sequence in sequences_below(block, sequences):
        cache.lease(sequence, parent, effects)
        sequence.tip = parent
        sequence.length = parent.end


def _flushed(session: Session) -> Flushed:
    failures = [list(failure) for failure in session.failures]
    session.failures.clear()
    return Flushed(session.completed, failures)
