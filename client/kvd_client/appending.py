"""How a sequence stores blocks: room in the staging, the append, and what an answer changes.

    stage ──► Staged ──written──► post_append ──reply──► Commit ──► finished: its room is free again
                 └──unstage: free at once                   └──refused: free at once

Covers flow control: `stage` waits while commits fill the staging or too many appends are
unanswered. The sequence itself: state.py; extents of the staging: staging.py.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from struct import pack
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvd_client.errors import (
    BadMessage,
    BadPayload,
    BadPosition,
    BadStaging,
    DeadlineExceeded,
    KvdError,
    NotStored,
    StagingFull,
    ViewsAlive,
    copy_error,
)
from kvd_client.operations import Operation, Wait, call
from kvd_client.session import Commit, Session
from kvd_client.staging import Staged, StagingArea
from kvd_client.state import SequenceState, Tokens, pack_tokens
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_APPEND_BLOCKS, Append, Appended, Flush

Payload = bytes | bytearray | memoryview | npt.NDArray[Any]
"""One block's bytes: anything contiguous."""

MAX_UNANSWERED = 256
"""Requests of a session. Far from the 1,000 replies after which the daemon drops some."""


def stage(sequence: SequenceState, n_tokens: int, wait: float | None) -> Operation[Staged]:
    """Room in the staging for the blocks of an append of `n_tokens` tokens.

    Waits up to `wait` seconds (None: the client's timeout) for commits on their way to be finished,
    then raises StagingFull.
    """
    _check_stores(sequence)
    session = sequence.live_session()
    area = session.staging
    if area is None:
        raise StagingFull("this client was opened without staging")
    client = sequence.context.client
    sizes = sizes_of(sequence, n_tokens)
    deadline = time.monotonic() + (client.timeout if wait is None else wait)
    while True:
        session.receive()
        sequence.check()
        staged = area.take(sizes) if session.in_flight < MAX_UNANSWERED else None
        if staged is not None:
            return staged
        left = deadline - time.monotonic()
        may_change = session.in_flight or area.has_commits() or client.overlapping
        if left <= 0 or not may_change:
            raise StagingFull(
                "the staging is full of blocks that are not stored yet", staging_bytes=area.size
            )
        with suppress(DeadlineExceeded):  # one more look, and then it is said to be full
            yield from wait_for_room(session, area, left)


def unstage(sequence: SequenceState, staged: Staged) -> None:
    """Give room back that is not needed after all; nothing if it was committed or given back."""
    session = sequence.session
    if session is not None and session.staging is not None and session.staging.is_unspent(staged):
        staged.spent = True
        session.staging.give_back(staged)


def post_append(sequence: SequenceState, tokens: Tokens, staged: Staged, start: int) -> Commit:
    """Send an append and do not wait. The staging and the commit's outcome take care of
    themselves. Raises BadPosition, and sends nothing, if `start`, where the blocks begin, is not
    where the sequence's full blocks end: an append before them has been refused meanwhile."""
    packed = pack_tokens(tokens)
    _check_stores(sequence)
    session = sequence.live_session()
    session.receive()  # an earlier append may have failed: this one must not build on it
    context = sequence.context
    block_tokens = context.model.block_tokens
    area = session.staging
    if area is None:
        raise StagingFull("this client was opened without staging")
    n_tokens = len(packed) // TOKEN_BYTES
    if sizes_of(sequence, n_tokens) != staged.sizes:
        raise BadPayload(
            "what was staged are other blocks than those of the tokens",
            tokens=n_tokens,
            staged_blocks=len(staged.sizes),
            block_tokens=block_tokens,
        )
    if not area.is_unspent(staged):
        raise BadStaging(
            "what is committed was staged in this session, and neither committed nor given back",
            of_this_session=staged.buffer is area.buffer,
            spent=staged.spent,
        )
    if start != sequence.full_tokens:
        raise BadPosition(
            "what this append builds on was not stored", start=start, expected=sequence.full_tokens
        )
    n_full = start // block_tokens
    if not sequence.invalidate_views(n_full):
        raise ViewsAlive(
            "arrays over the block that this append replaces are still alive", block=n_full
        )
    staged.spent = True
    commit = Commit(session, sum(staged.sizes))

    def answered(body: Any) -> None:
        commit.answered = True
        session.unanswered_appends -= 1
        sequence.n_unanswered -= 1
        if isinstance(body, Appended):
            commit.number, commit.stored = body.commit, body.stored
            commit.present, commit.joined = body.present, body.joined
            session.commits[commit.number] = commit
            session.last_commit = max(session.last_commit, commit.number)
            area.committed(staged, body.commit)
            return
        commit.error = body
        area.give_back(staged)
        # The blocks are not there; what comes next must not build on them.
        sequence.full_tokens = min(sequence.full_tokens, start)
        expected = body.details.get("expected")
        if isinstance(body, BadPosition) and not sequence.n_unanswered:
            # An earlier append failed after its reply. The daemon's word is the last one, since no
            # other append is on its way.
            assert isinstance(expected, int)
            sequence.full_tokens = expected

    offsets = pack(f"<{len(staged.offsets)}Q", *staged.offsets)
    message = Append(context.number, sequence.seq_id, sequence.generation, start, packed, offsets)
    sequence.n_appends += 1
    sequence.n_unanswered += 1
    session.unanswered_appends += 1
    try:
        session.send(message, answered)
    except KvdError:
        sequence.n_unanswered -= 1
        session.unanswered_appends -= 1
        area.give_back(staged)
        raise
    # The lease moves on: of the matched blocks only the full ones stay leased.
    del sequence.slots[n_full:]
    sequence.last_block_tokens = block_tokens if sequence.slots else 0
    sequence.full_tokens = start + n_tokens // block_tokens * block_tokens
    return commit


def post(
    sequence: SequenceState,
    tokens: Tokens,
    payloads: Staged | Iterable[Payload],
    start: int | None,
) -> Operation[Commit]:
    """Send an append of what was staged, or of payloads, which are copied into the staging first.
    Waits for room there, and not for the reply. The blocks begin at `start`; None: where the full
    blocks end now, before anything is taken in, as the caller has seen it."""
    start = sequence.full_tokens if start is None else start
    packed = pack_tokens(tokens)
    if isinstance(payloads, Staged):
        return post_append(sequence, packed, payloads, start)
    buffers = checked_payloads(sequence, packed, payloads)
    staged = yield from stage(sequence, len(packed) // TOKEN_BYTES, None)
    try:
        for index, buffer in enumerate(buffers):
            np.copyto(np.frombuffer(staged.block(index), np.uint8), buffer)
        return post_append(sequence, packed, staged, start)
    except BaseException:
        unstage(sequence, staged)
        raise


def append(
    sequence: SequenceState,
    tokens: Tokens,
    payloads: Staged | Iterable[Payload],
    start: int | None,
) -> Operation[Commit]:
    """`post`, and wait for the reply; raises what is answered."""
    commit = yield from post(sequence, tokens, payloads, start)
    timeout = sequence.context.client.timeout_for(commit.n_bytes)
    yield Wait(commit.session, commit.is_answered, timeout)
    if commit.error is not None:
        raise copy_error(commit.error)
    return commit


def not_stored(sequence: SequenceState) -> NotStored | None:
    """Why nothing of the sequence is stored, if its owner asked for that."""
    if sequence.stores:
        return None
    return NotStored("it was opened with store=False", seq_id=sequence.seq_id)


def _check_stores(sequence: SequenceState) -> None:
    error = not_stored(sequence)
    if error is not None:
        raise error


def sizes_of(sequence: SequenceState, n_tokens: int) -> list[int]:
    """Bytes of each block of an append of `n_tokens` tokens: full blocks, and an open tail."""
    if n_tokens < 1:
        raise BadMessage("an append has at least one token", got=n_tokens)
    n_blocks = -(-n_tokens // sequence.context.model.block_tokens)
    if n_blocks > MAX_APPEND_BLOCKS:
        raise BadMessage(
            "an append has too many blocks: commit fewer at a time",
            got=n_blocks,
            most=MAX_APPEND_BLOCKS,
        )
    payload, block_tokens = sequence.context.payload, sequence.context.model.block_tokens
    n_full, rest = divmod(n_tokens, block_tokens)
    return [payload.max_bytes] * n_full + ([payload.size(rest)] if rest else [])


def checked_payloads(
    sequence: SequenceState, tokens: bytes, payloads: Iterable[Payload]
) -> list[npt.NDArray[np.uint8]]:
    """Each payload as a flat array of its bytes. Raises BadPayload unless there is one of the exact
    size, and contiguous, for each block."""
    try:
        buffers = [np.frombuffer(cast(Any, each), np.uint8) for each in payloads]
    except (TypeError, ValueError, BufferError) as error:
        raise BadPayload(f"a payload is contiguous bytes: {error}") from None
    sizes = [each.size for each in buffers]
    expected = sizes_of(sequence, len(tokens) // TOKEN_BYTES)
    if sizes != expected:
        raise BadPayload(
            "an append has one payload of the exact size for each block",
            expected=_summary(expected),
            got=_summary(sizes),
        )
    return buffers


def wait_for_room(session: Session, area: StagingArea, timeout: float) -> Operation[None]:
    """Wait until something has changed that may make room; there are appends on their way, or
    commits whose copies are. Raises ServiceError, DeadlineExceeded among them."""
    commit = area.oldest_commit
    if commit is None or session.in_flight >= MAX_UNANSWERED:
        # An append's reply tells which commit to wait for.
        replies, changes = session.replies, area.changes

        def is_news() -> bool:
            return session.replies != replies or area.changes != changes

        yield Wait(session, is_news, timeout, may_fail=True)
    else:
        yield from call(session, Flush(commit), timeout, may_fail=True)


def _summary(sizes: list[int]) -> str:
    shown = ", ".join(map(str, sizes[:4])) + (", ..." if len(sizes) > 4 else "")
    return f"{len(sizes)} of {shown}" if sizes else "none"
